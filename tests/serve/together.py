"""A model that two processes hold answers as one that a single process holds, and neither process outlives the other."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread

import openai
import psutil
import pytest
import torch
from torch import distributed as dist
from waiting import eventually

from vlm.cli import run
from vlm.errors import RunError, UsageError
from vlm.serve.limits import Limits
from vlm.serve.replica import Settings
from vlm.together import TogetherVLM, load_together

VLM = str(Path(sys.executable).parent / "vlm")
TOKENS = 12
TEXTS = ["Hi", "What?", "A cat", "No. " * 20]


@pytest.fixture(scope="module")
def pair(folder) -> Iterator[TogetherVLM]:
    """The same, held by this process and another one."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    together = load_together(folder, 2, device="cpu")
    try:
        yield together
    finally:
        together.team.end()
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    assert not followers(psutil.Process())


def followers(process: psutil.Process) -> list[psutil.Process]:
    """The processes that follow one, or those that it started."""
    return [one for one in process.children(recursive=True) if "vlm.together.follower" in one.cmdline()]


@pytest.fixture(scope="module")
def talks(make_picture) -> list[list[dict]]:
    """Conversations with no, one and two pictures."""
    told = []
    for number, text in enumerate(TEXTS * 2):
        pictures = [{"type": "image", "image": make_picture(place)} for place in range(number % 3)]
        told.append([{"role": "user", "content": [*pictures, {"type": "text", "text": text + str(number)}]}])
    return told


# In Python


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 3, "top_k": 50}, {"num_beams": 3}, {"repetition_penalty": 1.5}]
)
def test_it_says_what_one_process_says(pair, model, talks, options):
    asked = {"max_new_tokens": TOKENS, "batch_size": 3, **options}
    expected = model.generate(talks, **asked)
    assert pair.generate(talks, **asked) == expected
    assert len(set(expected)) > 1


def test_everything_else_is_computed_alike(pair, model, make_picture):
    pictures = [make_picture(seed) for seed in range(3)]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for name, arguments in (("embed_text", (TEXTS,)), ("embed_image", (pictures,))):
        assert torch.allclose(getattr(pair, name)(*arguments), getattr(model, name)(*arguments), atol=1e-5)
    (mine,), (other,) = pair.loglikelihood([talk]), model.loglikelihood([talk])
    assert mine == pytest.approx(other, rel=1e-5)
    assert pair.loglikelihood_rolling(["A text."])[0] == pytest.approx(model.loglikelihood_rolling(["A text."])[0])
    assert pair.caption(pictures, max_new_tokens=3) == model.caption(pictures, max_new_tokens=3)
    assert "".join(pair.stream(talk[:1], max_new_tokens=5)) == "".join(model.stream(talk[:1], max_new_tokens=5))
    assert [word for word, _ in pair.fill_mask("a <mask>")] == [word for word, _ in model.fill_mask("a <mask>")]


def test_what_is_refused_leaves_them_in_step(pair, model, make_picture):
    with pytest.raises(UsageError, match="the text is empty"):
        pair.embed_text([" "])
    with pytest.raises(UsageError, match="no matching head"):
        pair.match([make_picture(0)], ["a"])
    assert pair.complete("a", max_new_tokens=3) == model.complete("a", max_new_tokens=3)


def test_what_the_others_do_not_hear_of_is_refused(pair, model):
    """It would wait for them."""
    ids = torch.tensor([[5, 6]])
    for alone in (pair.model, pair.model.states, partial(pair.model.generate, max_new_tokens=2)):
        with pytest.raises(UsageError, match="hear of VLM's methods alone; call one of these, not the model"):
            alone(ids)
    with pytest.raises(UsageError, match="hear of VLM's methods alone"):
        pair.model.encode_text(ids, torch.ones_like(ids))
    assert pair.complete("b", max_new_tokens=3) == model.complete("b", max_new_tokens=3)


def test_an_explanation_is_refused_before_any_work(pair, make_picture, monkeypatch):
    monkeypatch.setattr(pair, "generate", None)
    with pytest.raises(UsageError, match="^explain looks into the layers, which several processes hold; use vlm.load$"):
        pair.explain(make_picture(0), "What?", samples=60)


def test_a_process_holds_one_such_model(pair, folder):
    with pytest.raises(
        UsageError, match="in a process group already and can not hold a model with others; use a new one"
    ):
        load_together(folder, 2, device="cpu")


# Served


def test_it_is_served_as_any(pair, model, serving, image_part, make_picture):
    """Chats with pictures and without, embeddings, and hang-ups in the middle of it, by OpenAI's client."""
    content = [image_part(make_picture(1)), {"type": "text", "text": "What is it?"}]
    with serving(model=pair, rows=3, queue=32) as server:
        ask = server.client.chat.completions.create
        told = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0}
        streams = [ask(messages=[{"role": "user", "content": "Hi"}], stream=True, n=3, **told | {"max_tokens": 150})]
        streams.append(ask(messages=[{"role": "user", "content": content}], stream=True, **told | {"max_tokens": 150}))
        for stream in streams:
            next(iter(stream))
            stream.close()
        for asked in (content, "Hi", content):
            reply = ask(messages=[{"role": "user", "content": asked}], **told).choices[0].message.content
            parts = [{"type": "image", "image": make_picture(1)}, {"type": "text", "text": "What is it?"}]
            talk = [{"role": "user", "content": parts if asked is content else asked}]
            assert reply == model.generate(talk, max_new_tokens=TOKENS)
        vectors = server.client.embeddings.create(model="tiny", input=TEXTS).data
        assert torch.allclose(torch.tensor([one.embedding for one in vectors]), model.embed_text(TEXTS), atol=1e-5)
        server.healthy()


def test_a_death_is_told_to_who_asks(folder, pair):
    """The last one with this pair."""
    (other,) = followers(psutil.Process())
    other.kill()
    for _ in range(2):
        with pytest.raises(RunError, match="process 1 of the 2 that hold the model ended with -9; start them again"):
            pair.complete("a")


# The command


class Command:
    """`vlm serve` with these options as a process, and a client."""

    def __init__(self, folder: str, *options: str) -> None:
        command = [VLM, "serve", folder, "--port", "0", "--name", "tiny", "--device", "cpu", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)
        ready, _, _ = select.select([self.process.stdout], [], [], 300)
        line = self.process.stdout.readline() if ready and self.process.stdout else ""
        found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)/v1\n", line)
        assert found, (line, self.process.poll())
        self.url = found[1]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def said(self) -> str | None:
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": TOKENS, "temperature": 0}
        return self.client.chat.completions.create(model="tiny", **asked).choices[0].message.content

    def alive(self) -> int:
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
            return json.load(answer)["alive"]

    def ended(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=90)
        return self.process.returncode, err


@pytest.fixture
def command(folder) -> Iterator[Callable[..., Command]]:
    """Starts one; nothing of it is left."""
    started: list[Command] = []

    def start(*options: str) -> Command:
        started.append(Command(folder, *options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_a_process_that_dies_ends_the_server_with_one_line(pair, folder, model, capsys):
    """It answers OpenAI's client; who waits is told of the death; the command ends."""
    pair.team.end()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    seen: list[str] = []

    def ask() -> None:
        eventually(lambda: port in {one.laddr.port for one in psutil.Process().net_connections() if one.laddr})
        said = client.chat.completions.create(**asked, max_tokens=TOKENS, temperature=0)
        stream = client.chat.completions.create(**asked, max_tokens=200, n=8, stream=True)
        next(iter(stream))
        (other,) = followers(psutil.Process())
        other.kill()
        try:
            list(stream)
        except openai.APIError as error:
            seen.extend([said.choices[0].message.content or "", str(error)])

    asking = Thread(target=ask)
    asking.start()
    options = ["--name", "tiny", "--port", str(port), "--device", "cpu", "--tensor-parallel", "2"]
    assert run(["serve", folder, *options]) == 1
    asking.join()
    expected = model.generate(asked["messages"], max_new_tokens=TOKENS)
    assert seen == [expected, "the decoding engine has failed; start the server again"]
    told = capsys.readouterr()
    assert told.out == f"serving tiny at http://127.0.0.1:{port}/v1\n"
    assert told.err == "error: process 1 of the 2 that hold the model ended with -9; start them again\n"
    dist.destroy_process_group()  # as the end of the process would


@pytest.mark.heavy
def test_replicas_of_several_processes(command, model):
    """Four processes hold two models; one that dies takes its replica with it, which comes back; none is left over."""
    server = command("--replicas", "2", "--tensor-parallel", "2")
    main = psutil.Process(server.process.pid)
    expected = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=TOKENS)
    assert [server.said() for _ in range(4)] == [expected] * 4
    assert len(main.children()) == 2 and len(followers(main)) == 2
    cores = sorted(sorted(one.cpu_affinity()) for one in main.children(recursive=True))
    assert {core for kept in cores for core in kept} == os.sched_getaffinity(0)
    first = followers(main)[0]
    first.kill()
    eventually(lambda: server.alive() == 1)
    assert server.said() == expected
    eventually(lambda: server.alive() == 2)
    assert [server.said() for _ in range(4)] == [expected] * 4
    victim, _ = main.children()
    (orphan,) = followers(victim)
    victim.kill()
    eventually(lambda: not orphan.is_running())
    eventually(lambda: server.alive() == 2)
    everyone = main.children(recursive=True)
    assert len(everyone) == 4
    main.terminate()
    code, err = server.ended()
    assert code == 0 and "Traceback" not in err
    eventually(lambda: not any(one.is_running() for one in everyone))


# What is refused


def test_wrong_usage_is_one_line(folder, capsys):
    for options, told in (
        (
            ["--tensor-parallel", "3"],
            "tensor_parallel 3 does not divide the 4 heads of the language model; use a divisor",
        ),
        (["--tensor-parallel", "2", "--quantize", "int8"], "quantize does not work with tensor_parallel 2; leave one"),
        (
            ["--tensor-parallel", "2", "--compile"],
            "compile does not work with tensor_parallel 2; leave one of them out",
        ),
        (["--tensor-parallel", "3", "--replicas", "2"], "tensor_parallel 3 does not divide the 4 heads"),
    ):
        assert run(["serve", folder, *options]) == 2, options
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and told in error, error


def test_gpus_that_are_not_there_are_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    settings = Settings(folder, "tiny", Limits(), tensor_parallel=2)
    settings.check(1)
    with pytest.raises(UsageError, match="2 replicas of tensor_parallel 2 take 4 GPUs and 3 are there; lower one"):
        settings.check(2)
    with pytest.raises(UsageError, match="tensor_parallel 2 from GPU 2 on takes 4 GPUs and 3 are there; lower it"):
        load_together(folder, 2, device="cuda:2")
    with pytest.raises(
        UsageError, match="device is cpu, tensor_parallel is 2, and there are 3 GPUs.*CUDA_VISIBLE_DEVICES="
    ):
        load_together(folder, 2, device="cpu")
    with pytest.raises(UsageError, match="tensor_parallel is 1; it must be at least 2"):
        load_together(folder, 1)


@pytest.fixture
def dying(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Makes the processes that follow do something else."""

    def make(does: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return make


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("exit 3", "process 1 of the 2 that hold the model ended with 3; start them again"),
        ('echo \'{"error": "no memory"}\'', "process 1 of 2: no memory"),
    ],
)
def test_a_process_that_never_comes_is_told(folder, dying, does, told):
    """Before anybody waits for it."""
    dying(does)
    with pytest.raises(RunError, match=told):
        load_together(folder, 2, device="cpu")
