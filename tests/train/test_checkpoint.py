"""Checkpoints: a resumed run is the straight one bit by bit; what is missing or broken is told in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from precisions import FP16

from vlm.errors import UsageError
from vlm.saving import read
from vlm.settings import annotated_yaml
from vlm.train import loop
from vlm.train.loop import train

CLOCK = ("seconds", "samples_per_second", "tokens_per_second", "mfu", "memory_gib")
STAGES = (
    {"objective": "contrastive", "steps": 3, "batch": 4, "micro_batch": 2, "rates": {"vision": 0.5}},
    {"objective": "joint", "steps": 4, "batch": 4, "micro_batch": 2, "lora": {"r": 2, "dropout": 0.3}, "ema": 0.6},
)


@pytest.fixture(scope="module")
def dropping(save_model, make_text_config, tmp_path_factory) -> dict:
    """A saved model whose language model drops out."""
    assert make_text_config("gpt2").resid_pdrop > 0
    return {"path": save_model(tmp_path_factory.mktemp("dropping") / "model", "gpt2", gate_init=0.5)}


def go_on_from(out: Path, copy: Path, state: str) -> None:
    """A copy of a run as if it had stopped after writing `state`."""
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "model")
    (copy / "checkpoints" / "latest").write_text(state + "\n")


def told(lines: list[dict]) -> list[dict]:
    """The steps' lines without the clock."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines if "event" not in line]


def assert_the_same(resumed, straight) -> int:
    """Lines since the resumption and weights are those of the straight run; how many steps that were."""
    (event,) = resumed.events("resumed")
    since = told(resumed.lines[resumed.lines.index(event) :])
    assert since == told(straight.lines)[-len(since) :]
    weights = straight.weights()
    assert all(torch.equal(weights[name], value) for name, value in resumed.weights().items())
    return len(since)


@pytest.mark.parametrize(
    ("zero", "precision", "workers", "states"),
    [
        (0, "bf16", 2, {"stage0-step2": 5, "stage1-start": 4, "stage1-step3": 1}),
        (2, "fp32", 0, {"stage0-step2": 5, "stage1-step2": 2}),
        (3, "fp32", 0, {"stage1-step2": 2}),
        pytest.param(2, "fp16", 0, {"stage1-step2": 2}, marks=FP16),
    ],
)
def test_a_resumed_run_is_the_straight_one(run, tmp_path, dropping, zero, precision, workers, states):
    settings = {
        "zero": zero,
        "precision": precision,
        "model": dropping,
        "data": {"workers": workers},
        "checkpoint": {"every": 1, "keep": 9},
    }
    straight = run(*STAGES, **settings)
    assert len(straight.steps) == 7
    for state, left in states.items():
        go_on_from(straight.out, tmp_path / state, state)
        assert assert_the_same(run(*STAGES, **settings, into=state, resume=True), straight) == left


@pytest.fixture
def begin(make_config, tmp_path):
    """Starts a run in a process group of its own and gives the process, and its folder, once `enough` says so."""

    def started(stage: dict, enough, **settings) -> tuple[subprocess.Popen, Path]:
        out, file = tmp_path / "begun", tmp_path / "run.yaml"
        file.write_text(annotated_yaml(make_config(out, stage, **settings)))
        command = [sys.executable, "-m", "vlm.train", "--config", str(file)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, start_new_session=True, **pipes)
        while process.poll() is None and not enough(out):
            time.sleep(0.01)
        return process, out

    return started


def test_a_killed_run_goes_on_where_it_was(run, begin, dropping):
    stage = {"objective": "joint", "steps": 40}
    settings = {"model": dropping, "checkpoint": {"every": 2}, "data": {"workers": 1}}
    straight = run(stage, **settings)

    def has_two_states(out: Path) -> bool:
        latest = out / "checkpoints" / "latest"
        return latest.exists() and latest.read_text() not in ("stage0-start\n", "stage0-step2\n")

    process, killed = begin(stage, has_two_states, **settings)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "model").exists()
    resumed = run(stage, **settings, into=killed.name, resume=True)
    assert 0 < assert_the_same(resumed, straight) <= 36


def test_a_run_that_is_told_to_stop_saves_what_it_has(run, begin, dropping, outcome):
    """The whole process group is told, as launchers do it: data workers too, and twice."""
    stage = {"objective": "joint", "steps": 80}
    settings = {"model": dropping, "checkpoint": {"every": 1000}, "data": {"workers": 1}}

    def has_begun(out: Path) -> bool:
        return (out / "log.jsonl").exists() and '"step": 3,' in (out / "log.jsonl").read_text()

    process, stopped = begin(stage, has_begun, **settings)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate()
    assert process.returncode == 1 and not (stopped / "model").exists()
    left = outcome(stopped)
    (event,) = left.events("stopped")
    assert event["step"] == left.steps[-1]["step"] < 80
    state = stopped / "checkpoints" / f"stage0-step{event['step']}"
    assert told.splitlines()[-1] == (
        f"error: stopped by SIGTERM after step {event['step']} of stage 0; all of it is in {state}, and the same command "
        "with --resume goes on from there"
    )
    resumed = run(stage, **settings, into=stopped.name, resume=True)
    straight = run(stage, **settings)
    assert assert_the_same(resumed, straight) == 80 - event["step"]


def test_patience_is_resumed(run, tmp_path, pairs):
    """A run that stopped between two validations ends at the same step, with the same best model."""
    stage = {"objective": "joint", "steps": 30, "lr": 0.3, "schedule": "constant"}
    settings = {
        "data": {"val": pairs},
        "validation": {"every": 1, "samples": 4, "patience": 4, "keep_best": True},
        "checkpoint": {"every": 1, "keep": 99},
    }
    straight = run(stage, **settings)
    (*_, best), (*_, last) = straight.events("best"), straight.events("checkpoint")
    assert best["step"] < last["step"] < 29
    go_on_from(straight.out, tmp_path / "copy", f"stage0-step{last['step']}")
    assert assert_the_same(run(stage, **settings, into="copy", resume=True), straight) == 1
    best_weights = [read(out / "best")[0].state_dict() for out in (straight.out, tmp_path / "copy")]
    assert all(torch.equal(best_weights[0][name], value) for name, value in best_weights[1].items())


def test_only_the_newest_states_stay(run):
    left = run({"objective": "clm", "steps": 7}, checkpoint={"every": 2, "keep": 2})
    folders = {path.name for path in (left.out / "checkpoints").iterdir()}
    assert folders == {"latest", "stage0-start", "stage0-step4", "stage0-step6", "finished"}
    assert [event["step"] for event in left.events("checkpoint")] == [2, 4, 6]


def test_a_fresh_start_forgets_an_earlier_run(run):
    stage = {"objective": "clm", "steps": 5}
    first = run(stage, {"objective": "clm"}, checkpoint={"every": 2})
    again = run(stage, checkpoint={"every": 4})
    assert first.out == again.out
    kept = {path.name for path in (again.out / "checkpoints").iterdir()}
    assert kept == {"latest", "stage0-start", "stage0-step4", "finished"}
    assert [line["step"] for line in again.steps] == [1, 2, 3, 4, 5] and not again.events("resumed")


@pytest.mark.parametrize("zero", [0, 2])
def test_rates_are_those_that_the_config_says_now(run, tmp_path, monkeypatch, zero):
    stage = {"objective": "joint", "steps": 2, "lr": 0.001, "schedule": "constant"}
    settings = {"zero": zero, "checkpoint": {"every": 1}}
    left = run(stage | {"rates": {"vision": 0.5}}, **settings)
    go_on_from(left.out, tmp_path / "copy", "stage0-step1")
    seen: list[set[float]] = []

    def heard(optimizer, lr):
        set_rates(optimizer, lr)
        seen.append({round(group["lr"] / lr, 6) for group in optimizer.param_groups})

    set_rates = loop.set_rates
    monkeypatch.setattr(loop, "set_rates", heard)
    run(stage | {"rates": {"vision": 0.25}}, **settings, into="copy", resume=True)
    assert seen == [{0.25, 1.0}]


def test_a_run_from_a_model_in_its_own_folder_takes_nothing_else(run, base, tmp_path):
    """The base lies where the run's own model will stand, and is gone once the run has begun."""
    stage, settings = {"objective": "joint", "steps": 4}, {"checkpoint": {"every": 2}, "model": {"path": base}}
    straight = run(stage, into="straight", **settings)
    own = tmp_path / "own" / "model"
    shutil.copytree(base, own)
    (tmp_path / "own" / "log.jsonl").touch()
    settings["model"] = {"path": str(own)}
    assert told(run(stage, into="own", **settings).lines) == told(straight.lines)
    for state in ("stage0-start", "stage0-step2"):
        go_on_from(tmp_path / "own", tmp_path / state, state)
        assert_the_same(run(stage, into=state, **settings, resume=True), straight)


def test_words_are_those_that_the_run_began_with(run, make_shards, tmp_path):
    """A tokenizer made anew from data that have grown would have given each row of weights to another word."""
    texts = {f"{number}": {"text": f"{word} {word} words"} for number, word in enumerate(("red", "green", "blue"))}
    sizes = {"width": 32, "depth": 1, "heads": 2}
    vision = {"name": "timm:vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, **sizes}
    model = {"vision": vision, "text": {"family": "qwen3", **sizes}, "tokenizer": {"vocab_size": 300}}
    settings = {"model": model, "checkpoint": {"every": 2}}
    stage = {"objective": "clm", "steps": 4}
    left = run(stage, data={"train": make_shards(tmp_path / "few", texts)}, **settings)
    go_on_from(left.out, tmp_path / "copy", "stage0-step2")
    texts |= {f"more {number}": {"text": "quite other things are told here " * 3} for number in range(3)}
    grown = {"train": make_shards(tmp_path / "many", texts)}
    resumed = run(stage, data=grown, **settings, into="copy", resume=True)
    before, after = (read(out / "model")[1].tokenizer.get_vocab() for out in (left.out, resumed.out))
    assert before == after and [line["step"] for line in resumed.steps][-2:] == [3, 4]


# What cannot be resumed


@pytest.fixture
def stopped(run, make_config, tmp_path):
    """A run that can be resumed from its step 4, and its config."""
    stage = {"objective": "clm", "steps": 6}
    left = run(stage, checkpoint={"every": 2})
    (left.out / "checkpoints" / "latest").write_text("stage0-step4\n")
    return left.out, make_config(left.out, stage, checkpoint={"every": 2})


def fault_of(config) -> str:
    with pytest.raises(UsageError) as caught:
        train(config, resume=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_to_resume(make_config, tmp_path):
    text = fault_of(make_config(tmp_path / "never", {"objective": "clm"}))
    assert f"there is no {tmp_path}/never/checkpoints/latest to resume from; start without --resume" in text
    assert not (tmp_path / "never").exists()


def test_a_finished_run_has_nothing_left(run, make_config, tmp_path):
    left = run({"objective": "clm"})
    text = fault_of(make_config(left.out, {"objective": "clm"}))
    assert f"the run in {left.out} is complete; its model is {left.out}/model" in text


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        (
            {"optimizer": "muon"},
            {},
            "stages.0.optimizer is 'muon', and the run in .* was begun with 'adamw'; resume with",
        ),
        ({"rates": {"vision": 0.5}}, {}, r"stages.0.rates is \['vision'\], and the run in .* with \[\]"),
        ({"freeze": ["vision"]}, {}, "stages.0.freeze is"),
        ({"lora": {"r": 2}}, {}, "stages.0.lora.* is .* begun with None"),
        ({}, {"zero": 1}, "zero is 1, and the run in .* was begun with 0"),
        ({}, {"precision": "bf16"}, "precision is 'bf16', and the run in .* was begun with 'fp32'"),
        ({}, {"model": {"path": "elsewhere"}}, "model.path is 'elsewhere', and the run in .* was begun with"),
    ],
)
def test_settings_that_the_state_depends_on(stopped, make_config, stage, settings, words):
    out, config = stopped
    given = {"checkpoint": {"every": 2}, **settings}
    changed = make_config(out, {"objective": "clm", "steps": 6} | stage, **given)
    assert re.search(words, fault_of(changed))
    assert (out / "config.yaml").read_text() == annotated_yaml(config), "the earlier recipe is what is compared with"


def test_another_number_of_stages(stopped, make_config):
    out, _ = stopped
    changed = make_config(out, {"objective": "clm", "steps": 6}, {"objective": "joint"}, checkpoint={"every": 2})
    assert "the recipe has 2 stages, and the run in" in fault_of(changed)


def test_a_state_that_is_not_whole(stopped):
    out, config = stopped
    (out / "checkpoints" / "stage0-step4" / "progress.json").unlink()
    text = fault_of(config)
    assert (
        "latest names stage0-step4, which is not whole; write one of these into it: finished, stage0-start, stage0-step2"
        in text
    )


@pytest.mark.parametrize("words", ["", "gibberish", "{}", '{"stage": 0, "ranks": 1, "files": {}, "extra": 1}'])
def test_progress_that_says_nothing(stopped, words):
    out, config = stopped
    (out / "checkpoints" / "stage0-step4" / "progress.json").write_text(words)
    assert "names stage0-step4, which is not whole" in fault_of(config)


def test_a_file_that_was_cut_or_lost(stopped):
    out, config = stopped
    state = next((out / "checkpoints" / "stage0-step4" / "state").iterdir())
    size = state.stat().st_size
    with open(state, "r+b") as file:
        file.truncate(size - 1)
    assert f"{state} has {size - 1} bytes and should have {size}; write an older one into" in fault_of(config)
    state.unlink()
    assert f"{state} has None bytes and should have {size}" in fault_of(config)
    (out / "checkpoints" / "latest").write_text("stage0-step2\n")
    train(config, resume=True)
    assert (out / "model" / "model.safetensors").is_file(), "the mend mends"


def test_a_half_written_state_is_never_named(stopped):
    """What a run leaves that dies while it writes: a hidden folder, cleared away when that state is written again."""
    out, config = stopped
    half = out / "checkpoints" / ".stage0-step6.new"
    (half / "state").mkdir(parents=True)
    (half / "state" / "rubbish").write_text("x")
    train(config, resume=True)
    assert json.loads((out / "checkpoints" / "finished" / "progress.json").read_text())["stage"] == 1
