"""What is read off a model while it trains: right under every ZeRO stage, and without a trace in what it learns."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.saving import read

WATCHED = {"watch": {"every": 2}}
JOINT = {"objective": "joint", "steps": 5, "lr": 0.01, "micro_batch": 2, "contrastive_weight": 0.3}


def of_step(left, step: int) -> dict:
    return next(line for line in left.steps if line["step"] == step)


def test_every_so_many_steps_the_log_tells_more(run):
    left = run(JOINT, **WATCHED)
    extra = {"gates", "grad_norms", "looking_gap", "memory_gib"}
    assert [extra <= line.keys() for line in left.steps] == [False, True, False, True, False]
    assert all(not extra & line.keys() for line in left.steps[::2])
    told = of_step(left, 4)
    assert told["gates"]["attention"].keys() == told["gates"]["feed_forward"].keys() == {"0", "1", "2"}
    assert all(-1 < value < 1 for branch in told["gates"].values() for value in branch.values())
    assert 0 < told["memory_gib"]["host_peak"] < 24
    for line in left.steps:
        assert 0 < line["mfu"] < 1 and line["tokens_per_second"] > 0
        assert {"token_loss", "contrastive_loss"} <= line.keys()


def test_the_gates_are_those_of_the_model(run):
    left = run(JOINT | {"steps": 2}, **WATCHED)
    model = read(left.out / "model")[0]
    told = of_step(left, 2)["gates"]
    expected = model.gates()
    assert {layer: (told["attention"][layer], told["feed_forward"][layer]) for layer in told["attention"]} == expected


@pytest.mark.parametrize(("zero", "precision"), [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_the_parts_of_the_gradient_make_up_the_whole(run, zero, precision):
    """What the engine says of the whole is the judge."""
    weights = {"bf16": {"enabled": True}} if precision == "bf16" and zero else {}
    left = run(JOINT | {"clip": 0.1, "steps": 2}, watch={"every": 1}, zero=zero, precision=precision, deepspeed=weights)
    for told in left.steps:
        assert told["grad_norms"].keys() == {"vision", "adapters", "language_model", "heads"}
        assert all(value > 0 for value in told["grad_norms"].values())
        assert math.hypot(*told["grad_norms"].values()) == pytest.approx(told["grad_norm"], rel=1e-5)


def test_a_part_that_is_frozen_has_no_gradient(run):
    left = run(JOINT | {"contrastive_weight": 0.0, "freeze": ["vision", "language_model"]}, **WATCHED)
    assert of_step(left, 2)["grad_norms"].keys() == {"adapters"}


@pytest.mark.parametrize("zero", [0, 3])
def test_watching_changes_nothing(run, save_model, tmp_path, zero):
    """With dropout, so that a random number drawn in passing would show."""
    dropping = save_model(tmp_path / "dropping", "gpt2", gate_init=0.5)
    settings = {"model": {"path": dropping}, "zero": zero}
    stage = JOINT | {"steps": 3}
    watched = run(stage, into="watched", watch={"every": 1}, **settings)
    plain = run(stage, into="plain", watch={"every": 0}, **settings)
    assert all("looking_gap" in line for line in watched.steps)
    assert not any("looking_gap" in line or "grad_norms" in line for line in plain.steps)
    assert watched.losses == plain.losses
    weights = plain.weights()
    assert all(torch.equal(weights[name], value) for name, value in watched.weights().items())


def test_a_blind_model_has_no_looking_gap_and_a_seeing_one_has(run, save_model, make_shards, tmp_path):
    settings = {"model": {"path": save_model(tmp_path / "blind")}, **WATCHED}
    left = run(JOINT | {"steps": 2, "freeze": ["adapters"]}, **settings, into="blind")
    assert of_step(left, 2)["looking_gap"] == 0.0, "its gates are shut"
    # Two pictures that can only be told apart by looking.
    words = {"a": {"pictures": 1, "caption": "dark"}, "b": {"pictures": 1, "caption": "pale"}}
    shards = make_shards(tmp_path / "set", words)
    stage = {"objective": "joint", "steps": 30, "batch": 4, "lr": 1e-2}
    left = run(stage, data={"train": shards}, watch={"every": 30}, into="seeing")
    assert of_step(left, 30)["looking_gap"] > 0.3


def test_without_a_second_picture_there_is_no_gap_to_tell(run, make_shards, tmp_path):
    shards = make_shards(tmp_path / "set", {f"{n}": {"question": "why?", "answer": "so"} for n in range(4)})
    left = run(JOINT | {"contrastive_weight": 0.0}, data={"train": shards}, **WATCHED)
    assert "gates" in of_step(left, 2) and "looking_gap" not in of_step(left, 2)
