"""Two ranks are one: the same data and seed give the same losses, under every ZeRO stage."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import LIMIT, run_ranks
from safetensors.torch import load_file

from vlm import linear_cross_entropy
from vlm.errors import UsageError
from vlm.lora import load_lora
from vlm.saving import read
from vlm.settings import annotated_yaml
from vlm.shards import Shards
from vlm.train.batches import READERS, MicroBatches
from vlm.train.config import load_config
from vlm.train.loop import train
from vlm.train.order import Order

ZERO = (0, 1, 2, 3)
STAGES = (
    {"objective": "contrastive", "steps": 2},
    {"objective": "joint", "steps": 30, "contrastive_weight": 0.3},
)
JOINT = {"objective": "joint", "steps": 4, "lr": 0.01}
MATCHING = JOINT | {"steps": 6, "micro_batch": 4, "contrastive_weight": 0.3, "matching_weight": 0.5}
EXPERTS = {"experts": 4, "experts_per_token": 1, "gate_init": 0.5}
# Name -> stages and settings of what two ranks train one after the other.
RUNS = {
    **{f"zero {zero}": (STAGES, {"zero": zero, "checkpoint": {"every": 28}, "watch": {"every": 10}}) for zero in ZERO},
    "siglip": ([{"objective": "contrastive", "steps": 3, "loss": "siglip"}], {"zero": 3}),
    "checkpointed": ([JOINT], {"zero": 3, "gradient_checkpointing": True}),
    "plain": ([JOINT], {"zero": 0}),
    "lora": ([JOINT | {"lora": {"r": 2}}], {"zero": 3}),
    **{f"quantized {zero}": ([JOINT | {"lora": {"r": 2}}], {"zero": zero, "quantize": "int8"}) for zero in (1, 3)},
    **{f"ema {zero}": ([JOINT | {"ema": 0.6}], {"zero": zero}) for zero in (0, 2, 3)},
    "bf16": ([JOINT], {"zero": 2, "precision": "bf16"}),
    **{f"muon {zero}": ([JOINT | {"optimizer": "muon"}], {"zero": zero}) for zero in (0, 2, 3)},
    **{f"rates {zero}": ([JOINT | {"rates": {"vision": 0.1, "*.mlp.*": 3.0}}], {"zero": zero}) for zero in (0, 3)},
    **{f"experts {zero}": ([JOINT], {"zero": zero, "adapter": EXPERTS}) for zero in (0, 3)},
    **{f"matching {zero}": ([MATCHING], {"zero": zero}) for zero in (0, 3)},
}


@pytest.fixture(scope="module")
def mixed(make_shards, tmp_path_factory) -> str:
    """Samples with a picture, with two and without, of unequal lengths, one of them broken."""
    fields = {}
    for index in range(24):
        picture = {"pictures": 1 + index % 2, "caption": f"picture {index}"} if index % 3 == 0 else {}
        fields[f"{index:02d}"] = picture | {"question": "why?" * (1 + index % 4), "answer": "yes" * (1 + index % 5)}
    fields["broken"] = {"bytes": b"no picture", "caption": "x"}
    return make_shards(tmp_path_factory.mktemp("mixed") / "set", fields)


@pytest.fixture(scope="module")
def words(make_shards, tmp_path_factory) -> str:
    """Text alone."""
    fields = {f"{index}": {"text": "only words " * (1 + index % 4)} for index in range(7)}
    return make_shards(tmp_path_factory.mktemp("words") / "set", fields)


@pytest.fixture(scope="module")
def config_of(make_config, save_model, shallow, mixed, words, tmp_path_factory):
    """The config of a run by its name, for so many ranks that see the same micro-batches together."""
    folder = tmp_path_factory.mktemp("ranks")
    sparse = save_model(folder / "sparse", every=3, **EXPERTS)
    sources = [{"path": mixed, "weight": 3}, {"path": words, "weight": 1, "objectives": ["joint"]}]

    def make(name: str, ranks: int, held: int = 4):
        stages, fields = RUNS[name]
        fields = dict(fields)
        model = {
            "path": shallow if fields.pop("adapter", None) is None else sparse,
            "quantize": fields.pop("quantize", None),
        }
        sizes = {"batch": 8, "micro_batch": held // ranks}
        out = folder / f"{name} on {ranks}, {held} at once"
        return make_config(
            out, *[sizes | dict(stage) for stage in stages], **fields, model=model, data={"train": sources}
        )

    return make


@pytest.fixture(scope="module")
def two(config_of, outcome):
    """What every run leaves on two ranks, all in one start of two processes."""
    files = []
    for name in RUNS:
        config = config_of(name, 2)
        files.append(Path(config.out).with_suffix(".yaml"))
        files[-1].write_text(annotated_yaml(config), encoding="utf-8")
    run_ranks(2, __file__, *map(str, files))
    return {name: outcome(Path(config_of(name, 2).out)) for name in RUNS}


@pytest.fixture(scope="module")
def one(config_of, outcome):
    """What a run leaves in this one process."""
    known = {}

    def trained(name: str, held: int = 4):
        if (name, held) not in known:
            config = config_of(name, 1, held)
            train(config)
            known[name, held] = outcome(Path(config.out))
        return known[name, held]

    return trained


def difference(left, right) -> float:
    """The largest of two runs' losses, relative, or absolute below 1."""
    pairs = list(zip(left.losses, right.losses, strict=True))
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


# The same losses


def test_some_micro_batches_leave_a_rank_without_a_picture(mixed, make_processor, config_of):
    stage = config_of("zero 0", 2).stages[1]
    data = Shards.open(mixed)
    reader = READERS["joint"](make_processor(), stage, 256, True)
    order = Order([len(data)], [1.0], [0, 1])
    ranks = [MicroBatches([data], order, reader, 2, rank, 2) for rank in (0, 1)]
    seen = [tuple(bool((rank[number]["image_slots"] >= 0).any()) for rank in ranks) for number in range(40)]
    assert {(True, False), (False, True), (False, False), (True, True)} == set(seen)


@pytest.mark.parametrize("zero", ZERO)
def test_two_ranks_lose_what_one_loses(one, two, zero):
    alone, together = one("zero 0"), two[f"zero {zero}"]
    steps = [(0, 1), (0, 2), *((1, number) for number in range(1, 31))]
    assert [(line["stage"], line["step"]) for line in together.steps] == steps
    assert difference(together, alone) < 1e-4
    for mine, theirs in zip(together.steps, alone.steps, strict=True):
        assert (mine["samples"], mine["tokens"]) == (theirs["samples"], theirs["tokens"])
        assert math.isclose(mine["grad_norm"], theirs["grad_norm"], rel_tol=1e-2)
        names = ("top1", "token_accuracy", "contrastive_loss")
        assert all(math.isclose(mine.get(name, 0), theirs.get(name, 0), rel_tol=1e-2, abs_tol=0.05) for name in names)


@pytest.mark.parametrize("zero", ZERO)
def test_two_ranks_read_off_what_one_reads_off(one, two, zero):
    pairs = zip(two[f"zero {zero}"].steps, one("zero 0").steps, strict=True)
    watched = [(mine, theirs) for mine, theirs in pairs if "grad_norms" in theirs]
    assert len(watched) == 3 and "gates" in watched[-1][0]
    for mine, theirs in watched:
        assert mine["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-2)
        assert math.hypot(*mine["grad_norms"].values()) == pytest.approx(mine["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("zero", ZERO)
def test_two_ranks_learn_the_weights_that_one_learns(one, two, zero):
    alone, together = one("zero 0").weights(), two[f"zero {zero}"].weights()
    assert alone.keys() == together.keys()
    assert all(torch.allclose(together[name], value, rtol=1e-2, atol=1e-3) for name, value in alone.items())


def test_a_cut_contrastive_batch_on_two_ranks_is_the_whole_one(one, two):
    """Each pair against all eight: in one piece, in two, and in two on each of two ranks."""
    for name, ranked in (("siglip", two["siglip"]), ("zero 0", two["zero 3"])):
        whole, steps = one(name, held=8), len(one(name).losses)
        assert difference(one(name), whole) < 1e-4
        assert difference(ranked, whole) < 1e-4 and steps == len(whole.losses)
        norms = [[line["grad_norm"] for line in run.steps] for run in (one(name), ranked, whole)]
        assert np.allclose(norms, norms[-1], rtol=1e-2)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_muon_on_two_ranks(one, two, zero):
    """Gradients are clipped in no stage, or ZeRO would clip updates where one process clips gradients."""
    assert difference(two[f"muon {zero}"], one("muon 0")) < 1e-3
    assert one("muon 0").losses[-1] < one("muon 0").losses[0]


@pytest.mark.parametrize("zero", [0, 3])
def test_rates_by_pattern_on_two_ranks(one, two, zero):
    assert difference(two[f"rates {zero}"], one("rates 0")) < 1e-4
    assert difference(one("rates 0"), one("plain")) > 1e-3


def test_ranks_without_pairs_match_with_the_others(two):
    """Negatives are a rank's own, so two ranks are held to two ranks whose parameters nobody splits."""
    split, whole = two["matching 3"], two["matching 0"]
    assert difference(split, whole) < 1e-4
    losses = [[line["matching_loss"] for line in run.steps] for run in (split, whole)]
    assert np.allclose(*losses, rtol=1e-4) and max(losses[0]) > 0
    assert "matching_head.weight" in split.weights()


def test_ranks_whose_tokens_choose_other_experts_go_on_together(two):
    """The loss of balance is a mean over a micro-batch, so two ranks are held to two whose parameters nobody splits."""
    split, whole = two["experts 3"], two["experts 0"]
    assert difference(split, whole) < 1e-4
    told = [[line["adapter_router_loss"] for line in run.steps] for run in (split, whole)]
    assert np.allclose(*told, rtol=1e-4) and max(told[0]) > 0


def test_activations_are_computed_anew_under_zero_3(one, two):
    assert difference(two["checkpointed"], one("plain")) < 1e-4


def test_bf16_on_two_ranks(one, two):
    assert difference(two["bf16"], one("bf16")) < 1e-2
    weight = two["bf16"].weights()["language_model.lm_head.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_average_of_two_ranks_is_that_of_one(one, two, zero):
    alone, together = one("ema 0").weights(), two[f"ema {zero}"].weights()
    assert all(torch.allclose(together[name], value, rtol=1e-2, atol=1e-3) for name, value in alone.items())


def test_lora_under_zero_3_saves_what_it_trained(one, two, shallow):
    assert difference(two["lora"], one("lora")) < 1e-4
    folder = two["lora"].out / "adapter"
    for file in ("adapter_model.safetensors", "trained.safetensors"):
        tensors = load_file(folder / file)
        assert tensors and all(value.numel() > 0 for value in tensors.values())
    assert any(
        torch.count_nonzero(value)
        for name, value in load_file(folder / "adapter_model.safetensors").items()
        if "lora_B" in name
    )
    model, _ = read(shallow)
    load_lora(model, folder)
    merged, _ = read(two["lora"].out / "model")
    ids, pixels = torch.tensor([[3, 40, 50, 60]]), torch.ones(1, 3, 32, 32)
    found, expected = (each.eval()(ids, pixel_values=pixels).logits for each in (model, merged))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [1, 3])
def test_lora_on_a_quantized_base_on_two_ranks(one, two, shallow, zero):
    assert difference(two[f"quantized {zero}"], one(f"quantized {zero}")) < 1e-3, "a rounding that goes the other way"
    model = read(shallow)[0]
    load_lora(model, two[f"quantized {zero}"].out / "adapter")
    assert model.config.quantization["scheme"] == "int8"


def test_what_any_rank_passes_over_is_told(one, two):
    alone = {(event["stage"], event["key"], event["reason"]) for event in one("zero 0").events("skipped_sample")}
    together = [(event["stage"], event["key"], event["reason"]) for event in two["zero 2"].events("skipped_sample")]
    assert len(together) == len(set(together)) and set(together) == alone
    assert {"broken"} < {key for _, key, _ in alone}


# Stopping, and going on


@pytest.fixture
def stopped(two, tmp_path):
    """A copy of a run on two ranks that can be resumed from step 28 of its second stage, and its config file."""

    def copy(name: str) -> tuple[Path, Path]:
        out = tmp_path / "stopped"
        shutil.copytree(two[name].out, out)
        shutil.rmtree(out / "model")
        (out / "checkpoints" / "latest").write_text("stage1-step28\n")
        return out, two[name].out / "config.yaml"

    return copy


@pytest.mark.parametrize("name", ["zero 2", "zero 3"])
def test_two_ranks_resume_bit_by_bit(two, stopped, outcome, name):
    out, file = stopped(name)
    run_ranks(2, "vlm.train", "--config", str(file), f"out={out}", "--resume")
    resumed, straight = outcome(out), two[name]
    assert resumed.events("resumed")[0]["step"] == 28
    assert resumed.losses[-2:] == straight.losses[-2:]
    weights = straight.weights()
    assert all(torch.equal(weights[name], value) for name, value in resumed.weights().items())


def test_ranks_that_are_told_to_stop_go_on_bit_by_bit(two, outcome, tmp_path):
    """The launcher alone is told, and tells its ranks; each hears of it at a moment of its own."""
    straight, out = two["zero 1"], tmp_path / "stopped"
    config, override = straight.out / "config.yaml", f"out={out}"
    ours = [
        sys.executable,
        "-c",
        "from vlm.cli import main; main()",
        "train",
        str(config),
        override,
        "--processes",
        "2",
    ]
    with subprocess.Popen(ours, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            log = out / "log.jsonl"
            while process.poll() is None and not (log.exists() and '"lr"' in log.read_text()):
                time.sleep(0.01)
            process.terminate()
            _, told = process.communicate(timeout=LIMIT)
        finally:
            process.terminate()
    assert process.returncode == 1
    assert told.splitlines()[-1] == "error: stopped by SIGTERM; --resume goes on from the last checkpoint"
    (event,) = outcome(out).events("stopped")
    run_ranks(2, "vlm.train", "--config", str(config), override, "--resume")
    resumed = outcome(out)
    (start,) = resumed.events("resumed")
    assert (start["stage"], start["step"]) == (event["stage"], event["step"])
    assert resumed.losses == straight.losses
    weights = straight.weights()
    assert all(torch.equal(weights[name], value) for name, value in resumed.weights().items())


def test_another_number_of_processes_cannot_resume(stopped):
    out, file = stopped("zero 1")
    with pytest.raises(UsageError, match="stage1-step28 was written by 2 processes and this run has 1; resume with 2"):
        train(load_config(file, [f"out={out}"]), resume=True)


def main(config_files: list[str]) -> None:
    """Train each; all but those that others resume with several chunks of tokens, more on one rank than on the other."""
    plenty = linear_cross_entropy.MOST_LOGITS
    for config_file in config_files:
        linear_cross_entropy.MOST_LOGITS = plenty if Path(config_file).name.startswith("zero") else 6 * 288
        train(load_config(config_file))


if __name__ == "__main__":
    main(sys.argv[1:])
