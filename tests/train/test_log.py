"""The run log: every line is JSON, numbers are whole, and only the main rank writes."""

from __future__ import annotations

import json
import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlm.train.log import RunLog


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_lines_and_events(tmp_path, capsys):
    loss = 1 / 3
    with RunLog(tmp_path, main=True) as log:
        log.step(stage=0, step=1, loss=loss, lr=1e-3, samples=64, samples_per_second=torch.tensor(2.5), progress=0.5)
        log.event("skipped_sample", key="a/1", reason="truncated")
        log.step(stage=0, step=2, loss=math.nan, grad_norm=math.inf)
        log.say("a table [with brackets]")
    first, event, second = lines(tmp_path)
    assert first["loss"] == loss, "floats are written in full"
    assert first == {"stage": 0, "step": 1, "loss": loss, "lr": 1e-3, "samples": 64, "samples_per_second": 2.5}
    assert event == {"event": "skipped_sample", "key": "a/1", "reason": "truncated"}
    assert (second["loss"], second["grad_norm"]) == ("nan", "inf")
    out = capsys.readouterr().out
    assert "stage 0  50%" in out and "loss 0.3333" in out and "a table [with brackets]" in out


def test_away_from_a_terminal_few_lines_are_printed(tmp_path, capsys):
    with RunLog(tmp_path, main=True) as log:
        for step in range(50):
            log.step(stage=0, step=step, loss=1.0, progress=step / 100)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert len(lines(tmp_path)) == 50


def test_a_fresh_run_starts_anew_and_a_resumed_one_goes_on(tmp_path):
    for append, expected in ((False, 1), (True, 2), (False, 1)):
        with RunLog(tmp_path, main=True, append=append) as log:
            log.step(stage=0, step=1, loss=1.0)
        log.close()
        assert len(lines(tmp_path)) == expected


def test_other_ranks_leave_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", main=False) as log:
        log.step(stage=0, step=1, loss=1.0)
        log.event("resumed", step=1)
        log.say("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_tensorboard_scalars(tmp_path):
    with RunLog(tmp_path, main=True) as log:
        for step in (1, 2):
            log.step(stage=1, step=step, loss=0.5 / step, lr=1e-3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("stage1/loss")] == [(1, 0.5), (2, 0.25)]


def test_nested_numbers_and_validations_are_curves_too(tmp_path):
    with RunLog(tmp_path, main=True) as log:
        log.step(stage=0, step=2, loss=0.5, gates={"attention": {"3": 0.25}})
        log.validation(stage=0, step=2, samples=8, loss=0.75, accuracy={"count": 1.0}, asked={"count": 4})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    names = ["stage0/loss", "stage0/gates/attention/3", "stage0/validation/loss", "stage0/validation/accuracy/count"]
    assert sorted(board.Tags()["scalars"]) == sorted(names)
    assert [board.Scalars(name)[0].value for name in names] == [0.5, 0.25, 0.75, 1.0]
    assert lines(tmp_path)[1]["event"] == "validation" and lines(tmp_path)[1]["asked"] == {"count": 4}
