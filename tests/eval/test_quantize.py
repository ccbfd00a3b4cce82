"""`vlm quantize`: a folder that answers as it did, or an exit code of 1 and no folder."""

from __future__ import annotations

import json
import math

import pytest
import torch

import vlm
from vlm.cli import run
from vlm.eval import quantize as program
from vlm.eval.divergence import divergence
from vlm.quantization import is_quantized
from vlm.saving import save
from vlm.shards import Shards


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_model, make_processor):
    """A folder with a tiny model and scenes for its test."""
    folder = tmp_path_factory.mktemp("quantize")
    assert run(["data", "scenes", str(folder / "scenes"), "--train", "2", "--val", "2", "--test", "6"]) == 0
    save(make_model(gate_init=1.0), make_processor(), folder / "model")
    return folder


def command(made, out, *more: str) -> int:
    return run(["quantize", str(made / "model"), str(out), "--scheme", "int8", *more])


def test_a_folder_with_a_contract(made, tmp_path, capsys):
    report = tmp_path / "report.json"
    tolerant = ["--vqa-tolerance", "100", "--caption-tolerance", "100"]
    assert command(made, tmp_path / "q", "--data", str(made / "scenes"), "--out", str(report), *tolerant) == 0
    shown = capsys.readouterr().out
    for told in ("int8", "kept: norm", "vision", "logits: KL", "vqa: accuracy", "caption: CIDEr", "within 100"):
        assert told in shown
    numbers = json.loads(report.read_text())
    assert 0 < numbers["kl"]["mean"] <= numbers["kl"]["max"] < 0.1 and numbers["kl"]["tokens"] > 50
    assert set(numbers["scores"]) == {"vqa", "caption"} and all(one["held"] for one in numbers["scores"].values())
    assert numbers["weights"]["int8"]["modules"] == 40
    assert is_quantized(vlm.load(tmp_path / "q").model)


def test_without_data_quality_is_not_claimed(made, tmp_path, capsys):
    assert command(made, tmp_path / "q", "--vision") == 0
    assert "quality: not measured, for no --data was given" in capsys.readouterr().out
    assert vlm.load(tmp_path / "q").model.config.quantization == {"scheme": "int8", "vision": True, "base": False}


@pytest.mark.parametrize("name", ["vqa", "caption"])
def test_a_broken_contract_exits_1_and_leaves_no_folder(name, made, tmp_path, capsys, monkeypatch):
    asked = []

    def worse(model, task, *rest):
        asked.append(task)
        lost = 0.004 if is_quantized(model.model) else 0.0
        return {"accuracy": 0.9 - 2 * lost * (name == "vqa"), "CIDEr": 0.5 - 2 * lost * (name == "caption"), "n": 6}

    monkeypatch.setattr(program, "_score", worse)
    report = tmp_path / "report.json"
    assert command(made, tmp_path / "q", "--data", str(made / "scenes"), "--out", str(report)) == 1
    told = capsys.readouterr().err
    lost = {"vqa": "a loss of 0.80 points, beyond 0.5", "caption": "a loss of 1.60 %, beyond 1"}[name]
    assert told.startswith(f"error: int8 breaks the contract: {name}: ") and lost in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert [key for key, one in json.loads(report.read_text())["scores"].items() if not one["held"]] == [name]
    assert command(made, tmp_path / "q", "--data", str(made / "scenes"), f"--{name}-tolerance", "2") == 0
    assert (tmp_path / "q").is_dir() and asked.count("vqa") == 4


def test_what_is_refused(made, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert run(["quantize", *arguments]) == 2
        return capsys.readouterr().err

    model = str(made / "model")
    assert "scheme 'int3' is unknown; choose int8 or int4" in refused(model, str(tmp_path / "q"), "--scheme", "int3")
    assert "is the model itself; give another folder" in refused(model, model, "--scheme", "int8")
    assert "is a file" in refused(model, str(made / "model" / "config.json"), "--scheme", "int8")
    assert "must be at least 0" in refused(model, str(tmp_path / "q"), "--scheme", "int8", "--vqa-tolerance", "-1")
    assert command(made, tmp_path / "q") == 0
    assert "quantized to int8 already" in refused(str(tmp_path / "q"), str(tmp_path / "r"), "--scheme", "int4")
    (tmp_path / "words.txt").write_text("There is nothing to see here.")
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "There is nothing to see here."}) + "\n")
    assert run(["data", "convert", str(tmp_path / "words.jsonl"), str(tmp_path / "words"), "--format", "jsonl"]) == 0
    told = refused(model, str(tmp_path / "r"), "--scheme", "int8", "--data", str(tmp_path / "words"))
    assert "holds neither questions nor captions of pictures" in told
    assert not (tmp_path / "r").exists()


def test_divergence_is_the_formula(made):
    full, other = vlm.load(made / "model"), vlm.load(made / "model", quantize="int4")
    samples = Shards.open(made / "scenes" / "test").first(3)
    assert divergence(full, full, samples, 2)["mean"] == 0 and divergence(full, full, samples, 2)["agree"] == 1
    whole, alone = divergence(full, other, samples, 3), [divergence(full, other, [one], 1) for one in samples]
    tokens = sum(one["tokens"] for one in alone)
    assert whole["tokens"] == tokens and whole["max"] == pytest.approx(max(one["max"] for one in alone), rel=1e-3)
    assert math.isclose(whole["mean"], sum(one["mean"] * one["tokens"] for one in alone) / tokens, rel_tol=1e-3)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, targets = full.processor.encode_dialogue(turns)
    assert sum(targets) > 0 and torch.tensor(ids).numel() == len(targets)
