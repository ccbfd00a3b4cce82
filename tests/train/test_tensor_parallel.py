"""Ranks that hold one model together lose what one process loses, alone and beside others; what cannot be cut is refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from ranks import run_ranks

from vlm.errors import UsageError
from vlm.saving import read
from vlm.settings import annotated_yaml
from vlm.train.checkpoint import Checkpoints
from vlm.train.config import Config, load_config
from vlm.train.config_stage import Lora
from vlm.train.deepspeed_config import deepspeed_config
from vlm.train.loop import train
from vlm.train.objectives import OBJECTIVES
from vlm.train.optimization import make_optimizer
from vlm.train.ranks import join
from vlm.train.tensor_parallel import FAMILIES, check_model, check_settings, is_cut, whole

STAGES = (
    {"objective": "contrastive", "steps": 3},
    {"objective": "joint", "steps": 10, "contrastive_weight": 0.3},
    {"objective": "clm", "steps": 3},
)
BRIEF = tuple(stage | {"steps": 3} for stage in STAGES)
# Name -> processes, stages and settings.
RUNS = {
    "zero 0": (2, STAGES, {"watch": {"every": 2}, "checkpoint": {"every": 8}}),
    "zero 1": (2, BRIEF, {"zero": 1}),
    "bf16": (2, BRIEF, {"precision": "bf16"}),
    "masters": (2, BRIEF, {"precision": "bf16", "zero": 2, "deepspeed": {"bf16": {"enabled": True}}}),
    "two of two": (4, BRIEF, {"zero": 2, "watch": {"every": 2}}),
}


@pytest.fixture(scope="module")
def mixed(make_shards, tmp_path_factory) -> str:
    """Samples with a picture, with two, with a text alone."""
    fields = {}
    for index in range(24):
        picture = {"pictures": 1 + index % 2, "caption": f"picture {index}"} if index % 3 == 0 else {}
        asked = {"question": "why?" * (1 + index % 4), "answer": "yes" * (1 + index % 5)}
        fields[f"{index:02d}"] = picture | asked | {"text": "words " * (1 + index % 3)}
    return make_shards(tmp_path_factory.mktemp("mixed") / "set", fields)


@pytest.fixture(scope="module")
def config_of(make_config, mixed, tmp_path_factory):
    """The config of a run by its name: together, and of one process that sees the same micro-batches."""
    folder = tmp_path_factory.mktemp("together")

    def make(name: str, together: int) -> Config:
        ranks, stages, fields = RUNS[name]
        sizes = {"batch": 8, "micro_batch": 4 // (ranks // 2) if together > 1 else 4}
        settings = fields | {"data": {"train": mixed}, "tensor_parallel": together}
        return make_config(folder / f"{name} of {together}", *[dict(stage) | sizes for stage in stages], **settings)

    return make


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, config_of, save_model, tmp_path_factory):
    """Trains all runs of so many processes, in one start of them; two also get a model of every family that can be cut."""
    names = [name for name, (count, _, _) in RUNS.items() if count == request.param]
    files = []
    for name in names:
        config = config_of(name, 2)
        files.append(Path(config.out).with_suffix(".yaml"))
        files[-1].write_text(annotated_yaml(config), encoding="utf-8")
    folder = tmp_path_factory.mktemp("families")
    families = [save_model(folder / family, family, gate_init=0.5) for family in FAMILIES] if request.param == 2 else []
    run_ranks(request.param, __file__, *map(str, files), *families)
    return request.param, names


def test_ranks_that_hold_a_model_together_are_one(ranks, config_of, outcome):
    """Losses, counts, norms and what is saved: a whole model, close to the one that a single process learns."""
    _, names = ranks
    for name in names:
        mine = outcome(Path(config_of(name, 2).out))
        alone_config = config_of(name, 1)
        train(alone_config)
        alone = outcome(Path(alone_config.out))
        close = 1e-4 if RUNS[name][2].get("precision") != "bf16" else 2e-2
        assert len(mine.losses) == sum(stage["steps"] for stage in RUNS[name][1])
        for step, other in zip(mine.steps, alone.steps, strict=True):
            assert abs(step["loss"] - other["loss"]) < close * max(1.0, abs(other["loss"])), name
            assert (step["samples"], step["tokens"]) == (other["samples"], other["tokens"])
            assert math.isclose(step["grad_norm"], other["grad_norm"], rel_tol=max(1e-2, 5 * close)), name
            if "grad_norms" in other:
                assert step["grad_norms"] == pytest.approx(other["grad_norms"], rel=1e-2)
                assert math.hypot(*step["grad_norms"].values()) == pytest.approx(step["grad_norm"], rel=1e-4)
        learned, expected = mine.weights(), alone.weights()
        assert learned.keys() == expected.keys()
        if close == 1e-4:
            assert all(torch.allclose(learned[key], value, rtol=1e-2, atol=1e-3) for key, value in expected.items())
        assert all(value.shape == expected[key].shape for key, value in learned.items())


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_another_size_cannot_resume(config_of, ranks, monkeypatch):
    config = config_of("zero 0", 2)
    (Path(config.out) / "checkpoints" / "latest").write_text("stage1-step8\n")
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    with pytest.raises(UsageError, match="was written with tensor_parallel 2 and this run has 1; resume with 2"):
        Checkpoints(Path(config.out), keep=1).latest()


# What is refused


@pytest.mark.parametrize("uncut", ["gpt2", "phi3", "olmo2", "olmoe", "modernbert"])
def test_a_family_that_cannot_be_cut_is_refused_by_name(make_model, uncut):
    with pytest.raises(UsageError, match=f"family '{uncut}' does not work with tensor_parallel 2"):
        check_model(make_model(uncut), 2)


@pytest.mark.parametrize(
    ("size", "adapter", "told"),
    [
        (3, {}, "tensor_parallel 3 does not divide the 4 heads of the language model"),
        (4, {}, "tensor_parallel 4 does not divide the 2 key/value heads of the language model"),
        (2, {"heads": 1}, "tensor_parallel 2 does not divide the 1 heads of the adapters"),
        (2, {"heads": 4, "kv_heads": 1}, "tensor_parallel 2 does not divide the 1 key/value heads of the adapters"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(make_model, size, adapter, told):
    with pytest.raises(UsageError, match=told):
        check_model(make_model("qwen3", **adapter), size)


@pytest.mark.parametrize(
    ("stage", "fields", "told"),
    [
        ({}, {"zero": 3}, "tensor_parallel 2 works with zero 0, 1 or 2, and zero is 3"),
        ({}, {"compile": True}, "tensor_parallel 2 runs uncompiled, and compile is on"),
        ({"lora": Lora()}, {}, r"lora \{r: 8\} of stages.0 needs whole matrices, which tensor_parallel 2 cuts up"),
        ({"optimizer": "muon"}, {}, "optimizer muon of stages.0 needs whole matrices"),
    ],
)
def test_settings_that_contradict_it_are_refused(make_config, tmp_path, stage, fields, told):
    with pytest.raises(UsageError, match=told):
        check_settings(make_config(tmp_path, {"objective": "joint"} | stage, tensor_parallel=2, **fields))


def test_processes_that_it_does_not_divide_are_refused():
    with pytest.raises(UsageError, match="tensor_parallel 2 does not divide 1 processes; start a multiple of 2"):
        join(2)


@pytest.mark.parametrize(
    ("ours", "given", "told"),
    [
        (2, {"autotp_size": 4}, "tensor_parallel.autotp_size is 4, and tensor_parallel of the joint stage is 2"),
        (1, {"autotp_size": 4}, "tensor_parallel.autotp_size is 4, and tensor_parallel of the joint stage is 1"),
        (2, {"partition_config": {}}, "partition_config is set, and tensor_parallel 2 brings its own"),
    ],
)
def test_a_section_that_contradicts_it_is_refused(make_config, tmp_path, ours, given, told):
    config = make_config(tmp_path, {"objective": "joint"}, tensor_parallel=ours, deepspeed={"tensor_parallel": given})
    with pytest.raises(UsageError, match=told):
        deepspeed_config(config, config.stages[0], 1, "qwen3")


def test_auto_is_filled_in(make_config, tmp_path):
    given = {"tensor_parallel": {"autotp_size": "auto"}}
    config = make_config(tmp_path, {"objective": "joint"}, tensor_parallel=2, deepspeed=given)
    assert deepspeed_config(config, config.stages[0], 1, "qwen3")["tensor_parallel"]["autotp_size"] == 2
    plain = make_config(tmp_path, {"objective": "joint"})
    assert "tensor_parallel" not in deepspeed_config(plain, plain.stages[0], 1)


# What the ranks run


def check_family(folder: str) -> None:
    """Loss and gradients of the saved model with cut layers are those of the whole one; its attention and adapters are cut."""
    (held, _), (together, _) = read(folder, dtype="float32"), read(folder, dtype="float32")
    cut_up(together)
    expected, found = loss_of(held.eval()), loss_of(together.eval())
    assert abs(float(expected) - float(found)) < 1e-5 * abs(float(expected)), folder
    gradients = {name: value.grad for name, value in held.named_parameters() if value.grad is not None}
    cut = set()
    for name, parameter in together.named_parameters():
        if parameter.grad is None:
            continue
        cut |= {name} if is_cut(parameter) else set()
        wrong = (whole(parameter, parameter.grad) - gradients[name]).abs().max()
        assert wrong <= 1e-3 * gradients[name].abs().max() + 1e-7, (folder, name)
    for part, fewest in (("adapters.", 3 * 6), ("language_model.", 3 * 2)):
        assert sum(name.startswith(part) for name in cut) >= fewest, (folder, cut)


def cut_up(model) -> None:
    told = {"model": {"path": "-"}, "data": {"train": "-"}, "stages": [{"objective": "joint", "steps": 1, "batch": 1}]}
    config = Config.model_validate(told | {"precision": "fp32", "tensor_parallel": 2})
    (stage,) = config.stages
    settings = deepspeed_config(config, stage, 1, model.config.text_config.model_type)
    optimizer = make_optimizer(model, stage)
    deepspeed.initialize(model=OBJECTIVES["joint"](model, stage), optimizer=optimizer, config=settings)


def loss_of(model) -> torch.Tensor:
    """Of tokens that look at pictures, and of a comparison of both; with its gradients."""
    generator = torch.Generator().manual_seed(0)
    ids, pixels = torch.randint(4, 288, (2, 12), generator=generator), torch.randn(2, 3, 32, 32, generator=generator)
    ids[:, 0], mask = 3, torch.ones_like(ids)
    logits = model(ids, attention_mask=mask, pixel_values=pixels).logits
    likeness = (model.encode_image(pixels) * model.encode_text(ids, mask)).sum()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()) + likeness
    loss.backward()
    return loss.detach()


def main(paths: list[str]) -> None:
    """One rank: train each config, look at each saved model, and be refused another size."""
    for path in paths:
        if path.endswith(".yaml"):
            train(load_config(path))
        else:
            check_family(path)
    with pytest.raises(UsageError, match="trained with tensor_parallel 2 before, and cannot with 1; start new ones"):
        join(1)


if __name__ == "__main__":
    main(sys.argv[1:])
