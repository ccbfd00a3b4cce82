"""Whole runs in one process: what they log, what they leave and what they make of validation, for every objective."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from model_weights import equal, weights_of
from precisions import FP16

from vlm.errors import RunError
from vlm.saving import read, save
from vlm.shards import Shards
from vlm.train.batches import READERS, MicroBatches, on_device
from vlm.train.config import load_config
from vlm.train.config_stage import Stage
from vlm.train.loop import attention_of, take_step
from vlm.train.objectives import OBJECTIVES, Plan
from vlm.train.optimization import rate
from vlm.train.order import Order
from vlm.train.ranks import join

# The log


def test_a_line_for_every_step(run, make_config):
    stage = {"objective": "joint", "steps": 5, "micro_batch": 2, "warmup": 0.5, "lr": 0.01}
    left = run(stage)
    assert [list(line)[:8] for line in left.steps] == [
        ["stage", "step", "loss", "lr", "grad_norm", "samples", "tokens", "samples_per_second"]
    ] * 5
    assert [(line["stage"], line["step"], line["samples"]) for line in left.steps] == [
        (0, n, 4 * n) for n in range(1, 6)
    ]
    tokens = [line["tokens"] for line in left.steps]
    assert tokens[0] > 0 and all(np.diff(tokens) > 0)
    settings = make_config(left.out, stage).stages[0]
    assert [line["lr"] for line in left.steps] == pytest.approx([rate(settings, n / 10) for n in (1, 3, 5, 7, 9)])
    assert all(line["grad_norm"] > 0 and 0 <= line["token_accuracy"] <= 1 for line in left.steps)
    assert load_config(left.out / "config.yaml") == make_config(left.out, stage)
    assert list((left.out / "tensorboard").iterdir())


def test_the_first_loss_is_that_of_the_first_batch(run, base, pairs):
    """Over two micro-batches, by the model as it was."""
    left = run({"objective": "joint", "steps": 1, "batch": 4, "micro_batch": 2})
    assert math.isclose(left.losses[0], loss_of(base, pairs, left, 0, 4), rel_tol=1e-5)


def loss_of(model, shards: str, left, stage: int, samples: int, shuffle: bool = True) -> float:
    """The loss of a saved model on the first samples of a stage, as one batch."""
    settings = load_config(left.out / "config.yaml").stages[stage]
    loaded, processor = read(model)
    reader = READERS[settings.objective](processor, settings, 256, True)
    data = Shards.open(shards)
    batches = MicroBatches([data], Order([len(data)], [1.0], [0, stage], shuffle), reader, samples, 0, 1)
    batch = on_device(batches[0], torch.device("cpu"))
    objective = OBJECTIVES[settings.objective](loaded.eval(), settings)
    with torch.no_grad():
        return float(objective(batch, Plan(objective.targets(batch)))[0])


@pytest.mark.parametrize("most", [0.0, 1.0, 1e6])
def test_without_zero_a_long_gradient_is_shortened_as_torch_does(most):
    """Of a step in one process; one parameter has no gradient."""
    join()
    module, twin = (torch.nn.ModuleList(torch.nn.Linear(3, 5) for _ in range(2)) for _ in range(2))
    for own, theirs in zip(module[0].parameters(), twin[0].parameters(), strict=True):
        own.grad = torch.randn_like(own) * 10
        theirs.grad = own.grad.clone()
    module.stage = Stage(objective="clm", steps=1, clip=most)
    engine = SimpleNamespace(
        module=module,
        is_gradient_accumulation_boundary=lambda: True,
        zero_optimization=lambda: False,
        step=lambda: None,
    )
    norm = take_step(engine)
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), most or math.inf)
    assert math.isclose(norm, float(expected), rel_tol=1e-6) and norm > 1
    for own, theirs in zip(module[0].parameters(), twin[0].parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad)
    assert not any(own.grad.any() for own in module[1].parameters())


@pytest.mark.parametrize(
    ("asked", "longest", "found"), [("auto", 1024, "eager"), ("auto", 1025, "sdpa"), ("sdpa", 64, "sdpa")]
)
def test_attention_on_a_cpu_is_what_is_fast_there(make_config, tmp_path, asked, longest, found):
    config = make_config(tmp_path, {"objective": "joint", "max_tokens": longest}, attention=asked)
    expected = found if get_accelerator().device_name() == "cpu" else "sdpa"
    assert attention_of(config, config.stages[0]) == expected


def test_a_sample_that_is_passed_over_is_told_once(run, make_shards, tmp_path):
    fields = {
        "good": {"pictures": 1, "caption": "good"},
        "bad": {"bytes": b"no picture", "caption": "bad"},
        "long": {"pictures": 1, "caption": "fine", "question": "?" * 300, "answer": "x"},
    }
    left = run({"objective": "joint", "steps": 4}, data={"train": make_shards(tmp_path / "set", fields)})
    events = left.events("skipped_sample")
    assert Counter(event["key"] for event in events) == {"bad": 1, "long": 1}
    assert {"event", "key", "reason", "stage", "step"} <= events[0].keys()
    assert [line["samples"] for line in left.steps] == [4, 8, 12, 16], "another one takes its place"


# Sources


def test_a_source_of_text_serves_the_joint_stage_alone(run, pairs, make_shards, tmp_path):
    text = make_shards(tmp_path / "text", {f"{index}": {"text": "only words, and many of them"} for index in range(6)})
    stages = ({"objective": "contrastive"}, {"objective": "joint", "steps": 6, "batch": 8})
    mixed = [{"path": pairs, "weight": 3}, {"path": text, "weight": 1, "objectives": ["joint"]}]
    left = run(*stages, data={"train": mixed})
    assert not left.events("skipped_sample") and {line["stage"] for line in left.steps} == {0, 1}
    alone = run(*stages, into="alone", data={"train": pairs})
    assert left.losses[:2] == alone.losses[:2] and left.losses[2:] != alone.losses[2:]


# What is left


def test_the_second_stage_starts_from_what_the_first_left(run, pairs):
    first = {"objective": "contrastive", "lr": 0.01}
    both = run(first, {"objective": "joint", "steps": 1}, into="both")
    alone = run(first, into="alone")
    start = both.out / "checkpoints" / "stage1-start" / "model"
    assert equal(weights_of(start), alone.weights())
    assert math.isclose(both.losses[2], loss_of(start, pairs, both, 1, 4), rel_tol=1e-5)
    assert [(line["stage"], line["step"]) for line in both.steps] == [(0, 1), (0, 2), (1, 1)]


def test_the_model_that_is_left_is_the_trained_one(run, pairs):
    """It does on held-out data what the last validation said."""
    left = run({"objective": "joint", "steps": 3, "lr": 0.01}, data={"val": pairs}, validation={"samples": 8})
    (event,) = left.events("validation")
    assert math.isclose(event["loss"], loss_of(left.out / "model", pairs, left, 0, 8, shuffle=False), rel_tol=1e-5)


@pytest.mark.parametrize(
    ("objective", "language"),
    [("clm", "qwen3"), ("clm", "gpt2"), ("mlm", "qwen3"), ("mlm", "bert"), ("mlm", "modernbert")],
)
def test_text_alone_trains_the_language_model_alone(run, save_model, make_shards, tmp_path, objective, language):
    base = save_model(tmp_path / "base", language)
    text = make_shards(tmp_path / "set", {f"{index}": {"text": "abcd" * 5} for index in range(4)})
    stage = {"objective": objective, "steps": 25, "lr": 0.01} | ({"mask_share": 0.3} if objective == "mlm" else {})
    left = run(stage, model={"path": base}, data={"train": text})
    assert sum(left.losses[-3:]) / 3 < 0.7 * left.losses[0]
    before, after = weights_of(base), left.weights()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model"}


BF16_WEIGHTS = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("precision", "zero", "deepspeed", "optimizer"),
    [
        pytest.param("fp16", 1, {}, "adamw", marks=FP16),
        pytest.param("fp16", 2, {}, "muon", marks=FP16),
        pytest.param("fp16", 3, {}, "adamw", marks=FP16),
        ("bf16", 0, {}, "adamw"),
        ("bf16", 1, BF16_WEIGHTS, "adamw"),
        ("bf16", 3, BF16_WEIGHTS, "adamw"),
        ("bf16", 0, {}, "muon"),
        ("bf16", 2, {}, "muon"),
        ("bf16", 3, {}, "muon"),
    ],
)
def test_every_precision_and_optimizer_trains_to_fp32_weights(run, base, precision, zero, deepspeed, optimizer):
    stage = {"objective": "joint", "steps": 12, "lr": 0.01, "optimizer": optimizer}
    left = run(stage, precision=precision, zero=zero, deepspeed=deepspeed)
    assert left.losses[-1] < 0.8 * left.losses[0]
    before, after = weights_of(base), left.weights()
    assert before.keys() == after.keys()
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in after.values())
    moved = after["language_model.model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(moved, moved.bfloat16().float()), "the masters, not their shadows"


def test_a_stage_in_minutes_ends_when_they_are_over(run):
    left = run({"objective": "clm", "steps": None, "minutes": 0.005})
    times = [line["seconds"] for line in left.steps]
    assert times[-1] >= 0.3 > times[-2] if len(times) > 1 else times[-1] >= 0.3
    assert left.steps[0]["lr"] == 1e-3 and left.steps[-1]["lr"] < 1e-3


# Numbers that are not finite


@pytest.fixture
def poisoned(make_model, make_processor, make_shards, tmp_path) -> dict:
    """A model for which the letter z is not a number, and texts: every one, or every third, with a z."""
    model, processor = make_model("qwen3"), make_processor()
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("z")] = math.nan
    save(model, processor, tmp_path / "poisoned")
    texts = {"all": ["zz"] * 3, "some": ["ab", "cd", "ez", "fg"]}
    shards = {
        name: make_shards(tmp_path / name, {str(n): {"text": text} for n, text in enumerate(listed)})
        for name, listed in texts.items()
    }
    return {"model": {"path": str(tmp_path / "poisoned")}} | shards


PRECISIONS = [(0, "fp32"), (2, "bf16"), (1, "fp32"), (3, "fp32"), pytest.param(1, "fp16", marks=FP16)]


@pytest.mark.parametrize(("zero", "precision"), PRECISIONS)
def test_a_step_that_is_not_finite_changes_nothing(run, poisoned, zero, precision):
    settings = {"model": poisoned["model"], "zero": zero, "precision": precision}
    left = run({"objective": "clm", "steps": 3, "lr": 0.1}, **settings, data={"train": poisoned["all"]})
    before = weights_of(poisoned["model"]["path"])
    if precision == "fp16":  # DeepSpeed makes the masters of what trains out of its weights in fp16
        trained = [name for name in before if name.startswith("language_model.")]
        before |= {name: before[name].half().float() for name in trained}
    assert equal(left.weights(), before)
    assert [event["step"] for event in left.events("nonfinite")] == [1, 2, 3]
    assert left.losses == ["nan"] * 3


@pytest.mark.parametrize(("zero", "precision"), PRECISIONS[:2])
def test_the_other_steps_train_on(run, poisoned, zero, precision):
    settings = {"model": poisoned["model"], "zero": zero, "precision": precision}
    stage = {"objective": "clm", "steps": 24, "batch": 1, "lr": 0.01}
    left = run(stage, **settings, data={"train": poisoned["some"]})
    finite = [loss for loss in left.losses if loss != "nan"]
    assert len(finite) == 18 and len(left.events("nonfinite")) == 6
    assert sum(finite[-3:]) < 0.8 * sum(finite[:3])
    weights = left.weights()
    assert int(torch.isnan(weights.pop("language_model.model.embed_tokens.weight")).sum()) == 32
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_run_that_never_recovers_ends(run, poisoned):
    stage = {"objective": "clm", "steps": 40, "batch": 1}
    with pytest.raises(RunError, match="loss nan and gradient norm .* for 25 steps in a row, up to step 25; lower lr"):
        run(stage, model=poisoned["model"], data={"train": poisoned["all"]})


# Validation


def test_validation_says_what_is_right_by_type(run, pairs):
    left = run({"objective": "joint", "steps": 5}, data={"val": pairs}, validation={"every": 2, "samples": 100})
    events = left.events("validation")
    assert [event["step"] for event in events] == [2, 4, 5]
    for event in events:
        assert event["asked"] == {"colour": 12, "count": 12}
        assert event["accuracy"].keys() == {"colour", "count"}
        assert event["gates"].keys() == {"0", "1", "2"} and 0 <= event["token_accuracy"] <= 1


def test_validation_changes_nothing(run, pairs):
    stage = {"objective": "joint", "steps": 4, "lr": 0.01, "micro_batch": 2}
    watched = run(stage, into="watched", data={"val": pairs}, validation={"every": 1, "samples": 4})
    plain = run(stage, into="plain")
    assert watched.losses == plain.losses and equal(watched.weights(), plain.weights())


@pytest.mark.parametrize("objective", ["contrastive", "clm", "mlm"])
def test_every_objective_is_validated(run, pairs, objective):
    left = run({"objective": objective}, data={"val": pairs}, validation={"every": 1, "samples": 8})
    assert [event["step"] for event in left.events("validation")] == [1, 2]
    assert all(math.isfinite(event["loss"]) and "accuracy" not in event for event in left.events("validation"))
    for event in left.events("validation"):
        assert ("perplexity" in event) == (objective != "contrastive")
        assert math.isclose(event.get("perplexity", math.exp(event["loss"])), math.exp(event["loss"]), rel_tol=1e-5)


# The best model


WILD = {
    "objective": "joint",
    "steps": 30,
    "lr": 0.3,
    "schedule": "constant",
}  # it only gets worse from the first steps on


def test_the_best_model_stays(run, pairs):
    validation = {"every": 1, "samples": 12, "keep_best": True}
    left = run({"objective": "clm"}, WILD | {"steps": 5}, data={"val": pairs}, validation=validation)
    told = [event for event in left.events("validation") if event["stage"] == 1]
    best = min(told, key=lambda event: event["loss"])
    assert best["step"] < 5, "or the test shows nothing"
    assert {event["stage"] for event in left.events("best")} == {1}, "of the last stage alone"
    event = left.events("best")[-1]
    assert (event["loss"], event["step"], event["path"]) == (best["loss"], best["step"], str(left.out / "best"))
    assert math.isclose(loss_of(left.out / "best", pairs, left, 1, 12, shuffle=False), best["loss"], rel_tol=1e-5)
    assert not equal(weights_of(left.out / "best"), left.weights())
    run({"objective": "clm"})
    assert not (left.out / "best").exists(), "a fresh run forgets it"


@pytest.mark.parametrize(("zero", "extra"), [(3, {}), (0, {"lora": {"r": 2}})])
def test_keeping_the_best_changes_nothing(run, pairs, zero, extra):
    stage = {"objective": "joint", "steps": 3, "lr": 0.01} | extra
    keeping = {"data": {"val": pairs}, "validation": {"every": 1, "samples": 4, "keep_best": True}}
    kept = run(stage, into="kept", zero=zero, **keeping)
    plain = run(stage, into="plain", zero=zero)
    assert len(kept.events("best")) == 3
    assert kept.losses == plain.losses and equal(kept.weights(), plain.weights())
    assert equal(weights_of(kept.out / "best"), plain.weights()), "the last was the best"


def test_a_stage_ends_when_patience_is_over(run, pairs):
    validation = {"every": 2, "samples": 12, "patience": 3}
    left = run(WILD, {"objective": "clm", "steps": 1}, data={"val": pairs}, validation=validation)
    losses = [event["loss"] for event in left.events("validation") if event["stage"] == 0]
    assert losses.index(min(losses)) == len(losses) - 4
    assert [line["step"] for line in left.steps if line["stage"] == 0][-1] == 2 * len(losses) < 30
    assert [line["stage"] for line in left.steps][-1] == 1, "the next one follows"
