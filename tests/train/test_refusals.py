"""What a run refuses before the first step, in one line, with nothing trained and nothing of an earlier run lost."""

from __future__ import annotations

import pytest
from deepspeed.accelerator import get_accelerator

from vlm.errors import UsageError


def refused(run, words: str, *stages, **fields) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run(*stages, **fields)
    assert "\n" not in str(caught.value)


def nothing_was_trained(out) -> bool:
    return not (out / "model").exists() and not (out / "log.jsonl").exists()


def test_a_stage_whose_data_holds_nothing(run, make_shards, tmp_path):
    text = make_shards(tmp_path / "text", {key: {"pictures": 1, "text": "said of nothing"} for key in "ab"})
    stages = ({"objective": "clm"}, {"objective": "joint"})
    words = "^stages.1: none of 2 samples of .*/text can be used by objective joint; the last: sample . has no caption"
    refused(run, words, *stages, data={"train": text})
    assert nothing_was_trained(tmp_path / "run")


def test_a_start_that_fails_leaves_an_earlier_run_as_it_was(run, make_shards, pairs, tmp_path):
    run({"objective": "clm"}, data={"train": pairs})
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    text = make_shards(tmp_path / "text", {"a": {"text": "x"}})
    refused(run, "^stages.0: none of 1 samples", {"objective": "contrastive"}, data={"train": text})
    assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"deepspeed": "no/such.json"}, "deepspeed: no/such.json cannot be read"),
        (
            {"deepspeed": {"gradient_clipping": 0.5}},
            "gradient_clipping is 0.5, and clip of the contrastive stage is 1.0",
        ),
        ({"data": {"val": "WORDS"}}, "^stages.1: none of 1 samples of .* can be used by objective contrastive"),
    ],
)
def test_what_stands_against_a_later_stage_stands_against_the_run(run, make_shards, tmp_path, fields, words):
    run({"objective": "clm"})
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    if fields.get("data") == {"val": "WORDS"}:
        fields = {"data": {"val": make_shards(tmp_path / "words", {"a": {"text": "only words"}})}}
    refused(run, words, {"objective": "clm", "clip": 0.5}, {"objective": "contrastive"}, **fields)
    assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == before


def test_a_folder_with_something_that_no_run_has_left(run, tmp_path):
    mine = tmp_path / "run" / "model" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("dear to me")
    refused(run, "out .*/run holds model and no log.jsonl, so no run has left that", {"objective": "clm"})
    assert mine.read_text() == "dear to me"


def test_a_source_that_holds_nothing_however_small_its_share(run, make_shards, pairs, tmp_path):
    text = make_shards(tmp_path / "text", {"a": {"pictures": 1, "text": "said of nothing"}})
    sources = [{"path": pairs, "weight": 1000.0}, {"path": text, "weight": 0.001}]
    refused(run, "^stages.0: none of 1 samples of .*/text can be used", {"objective": "joint"}, data={"train": sources})
    assert nothing_was_trained(tmp_path / "run")


@pytest.mark.parametrize("objective", ["joint", "clm"])
def test_writing_with_a_family_that_only_reads(run, save_model, tmp_path, objective):
    bert = save_model(tmp_path / "bert", "bert")
    words = f"stages.1: objective {objective} writes text, and family bert only reads it; use contrastive or mlm"
    refused(run, words, {"objective": "mlm"}, {"objective": objective}, model={"path": bert})
    assert nothing_was_trained(tmp_path / "run")


def test_shards_that_are_not_there(run, tmp_path):
    refused(run, "no/such: no such shard", {"objective": "joint"}, data={"train": "no/such"})
    refused(run, "no/such: no such shard", {"objective": "joint"}, data={"val": "no/such"})
    assert nothing_was_trained(tmp_path / "run")


def test_a_precision_that_the_device_has_not(run, tmp_path, monkeypatch):
    device = get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: False)
    words = f"precision fp16 does not work on {device.device_name()}; use bf16"
    refused(run, words, {"objective": "joint"}, precision="fp16", zero=1)
    assert nothing_was_trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"freeze": ["visoin"]}, "freeze pattern 'visoin' matches none"),
        ({"rates": {"visoin": 0.1}}, "rates pattern 'visoin' matches none"),
        ({"lora": {"targets": ["q"]}}, "lora target 'q' matches none"),
        ({"lora": {"towers": ["text", "vision"], "targets": ["q_proj"]}}, "lora targets .* of tower vision"),
        ({"train": ["adapters"], "freeze": ["adapters"]}, "nothing to train"),
        ({"lora": {"r": 2}, "freeze": ["language_model"]}, "none of the .* lora parameters of tower text to train"),
    ],
)
def test_patterns_and_targets_that_match_nothing(run, tmp_path, stage, words):
    stage = {"objective": "joint", **stage}
    refused(run, f"^stages.0: .*{words}", stage)
    refused(run, f"^stages.1: .*{words}", {"objective": "joint", "lora": {"r": 2}}, stage)
    assert nothing_was_trained(tmp_path / "run")


def test_stages_are_tried_without_a_trace(run, tmp_path):
    """The first of two, and the same alone: what was tried for the second does not show."""
    first = {"objective": "joint", "lora": {"r": 2, "towers": ["text", "vision"]}}
    both = run(first, {"objective": "joint", "lora": {"r": 4, "dora": True}, "freeze": ["*.lora_B.*"]}, into="both")
    alone = run(first, into="alone")
    assert [entry["loss"] for entry in both.steps if entry["stage"] == 0] == [entry["loss"] for entry in alone.steps]
