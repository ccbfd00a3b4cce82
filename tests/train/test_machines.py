"""Two machines are one process: two network namespaces, joined by nothing but a cable, meet through torchrun."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from vlm.settings import annotated_yaml
from vlm.train.config import load_config
from vlm.train.loop import train

LIMIT = 300  # seconds until machines that wait for each other are a failure
STAGES = (
    {"objective": "contrastive", "steps": 2},
    {"objective": "joint", "steps": 30, "contrastive_weight": 0.3},
)
ZERO = (0, 3)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Two namespaces and the two ends of a cable between them: (namespace, device, address) each."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces take root and iproute2")
    number = os.getpid()
    ends = [(f"vlm{number}-{end}", f"vlm{number}{end}", f"10.213.7.{1 + place}") for place, end in enumerate("ab")]
    with ExitStack() as undo:
        try:
            for name, _, _ in ends:
                ip("netns", "add", name)
                undo.callback(ip, "netns", "del", name)
            (first, here, _), (second, there, _) = ends
            ip("link", "add", here, "netns", first, "type", "veth", "peer", "name", there, "netns", second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for name, device, address in ends:
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            for each in (device, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield ends


@pytest.fixture(scope="module")
def config_of(make_config, make_shards, shallow, tmp_path_factory):
    """The config of a run under a ZeRO stage on two machines, or of one process that sees the same micro-batches."""
    folder = tmp_path_factory.mktemp("machines")
    fields = {
        f"{index:02d}": ({"pictures": 1 + index % 2, "caption": f"picture {index}"} if index % 3 == 0 else {})
        | {"question": "why?" * (1 + index % 4), "answer": "yes" * (1 + index % 5)}
        for index in range(24)
    }
    data = {"train": make_shards(folder / "set", fields)}

    def config(zero: int, ranks: int):
        sizes = {"batch": 8, "micro_batch": 4 // ranks}
        stages = [stage | sizes for stage in STAGES]
        out = folder / f"zero {zero} on {ranks}"
        return make_config(out, *stages, data=data, model={"path": shallow}, zero=zero)

    return config


def test_two_machines_lose_what_one_process_loses(machines, config_of, outcome):
    """With weights whole and split, in one start of the machines."""
    files = []
    for zero in ZERO:
        config = config_of(zero, 2)
        files.append(Path(config.out).with_suffix(".yaml"))
        files[-1].write_text(annotated_yaml(config), encoding="utf-8")
    with ExitStack() as stack:
        started = [stack.enter_context(machine(place, machines, files)) for place in range(2)]
        try:
            told = [process.communicate(timeout=LIMIT)[0] for process in started]
        finally:
            for process in started:
                process.terminate()  # a launcher that is told so ends its ranks
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)[-6000:]
    alone = outcome(train(config_of(0, 1)).parent)
    for zero in ZERO:
        mine = outcome(Path(config_of(zero, 2).out))
        assert mine.events("started")[0]["processes"] == 2 and len(mine.losses) == 32
        assert mine.losses == pytest.approx(alone.losses, rel=1e-4, abs=1e-4), f"zero {zero}"


def machine(place: int, machines: list[tuple[str, str, str]], configs: list[Path]) -> subprocess.Popen:
    """One machine's torchrun; the first one hosts the meeting."""
    name, device, address = machines[place]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", f"{machines[0][2]}:29400"]
    meeting += ["--rdzv-conf", f"is_host={1 - place}", "--local-addr", address]
    sizes = ["--nnodes", "2", "--nproc-per-node", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *sizes, *meeting]
    given = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device}
    command = ["ip", "netns", "exec", name, *launcher, __file__, *map(str, configs)]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


if __name__ == "__main__":
    gc.freeze()
    for file in sys.argv[1:]:
        train(load_config(file))
