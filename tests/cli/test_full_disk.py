"""A disk that runs full under a command: one line that names what was being written, exit 1, nothing that looks whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from vlm.cli import run
from vlm.data_tools.scenes import generate_scenes
from vlm.model import VLMModel
from vlm.saving import save
from vlm.shards import ShardFileWriter

WRITTEN = ["samples.jsonl", "vqa_results.json", "vqa@test-compositional_results.json", "results.json"]  # in this order


@pytest.fixture
def failing(capsys):
    """Runs a command that must fail with exit 1 and one line, and gives the line."""

    def call(*arguments: str) -> str:
        assert run([str(argument) for argument in arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A few generated pictures."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=4, val=2, test=3)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model, make_processor) -> Path:
    """A saved tiny model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save(make_model(), make_processor(), folder)
    return folder


@pytest.fixture
def room(monkeypatch):
    """room(owner, name, n): the n-th call of that function, counted from 0, and every later one finds the disk full."""

    def limit(owner: object, name: str, calls: int) -> None:
        real, made = getattr(owner, name), []

        def limited(*arguments: object, **options: object) -> object:
            made.append(name)
            if len(made) > calls:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, limited)

    return limit


@pytest.mark.parametrize("calls", [0, 3, 7])
def test_scenes(failing, room, tmp_path, calls):
    """In the first split, or when others are whole already."""
    room(ShardFileWriter, "write", calls)
    line = failing("data", "scenes", tmp_path / "s", "--train", "4", "--val", "2", "--test", "2", "--processes", "1")
    assert line == f"error: {tmp_path}/s: no space left on the disk; free some and run it again\n"
    assert not list(tmp_path.iterdir())


def test_convert(failing, room, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 3)
    room(ShardFileWriter, "write", 2)
    line = failing("data", "convert", tmp_path / "a.jsonl", tmp_path / "s")
    assert line == f"error: {tmp_path}/s: no space left on the disk; free some and run it again\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("name", WRITTEN)
def test_evaluation(failing, room, tmp_path, model, scenes, name):
    """Results of an earlier evaluation do not stay beside other samples."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"model": "an earlier one"}')
    room(os, "fsync", WRITTEN.index(name))
    line = failing("eval", model, "vqa", "--data", scenes, "--out", tmp_path / "out", "--no-blind", "--no-shuffled")
    assert line == f"error: {tmp_path}/out/{name}: no space left on the disk; free some and run it again\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(WRITTEN[: WRITTEN.index(name)])


def full(self: VLMModel, folder: Path, **_: object) -> None:
    """In place of `save_pretrained`, on a disk without room for the weights."""
    (folder / "config.json").write_text("{}")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def training(model, scenes, tmp_path) -> list[str]:
    """The arguments of a short run with a checkpoint."""
    stages = "stages=[{objective: joint, steps: 3, batch: 2}]"
    settings = [f"data.train={scenes}/train", "data.workers=0", "precision=fp32", "checkpoint.every=2", stages]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"path": str(model)}, "data": {"train": "…"}, "stages": [], "out": "…"}))
    return ["train", str(recipe), *settings, f"out={tmp_path}/run"]


def test_the_log_of_a_training(failing, training, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    assert "no space left on the disk; free some" in failing(*training)
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint(failing, training, tmp_path, monkeypatch):
    """torch writes as far as it can and raises an error of its own kind."""

    def full(state: object, path: object, *_: object, **__: object) -> None:
        Path(str(path)).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0\nat a long trace")

    monkeypatch.setattr(torch, "save", full)
    line = failing(*training)
    assert line.startswith(f"error: checkpoint {tmp_path}/run/checkpoints/stage0-step2 cannot be written: ")
    assert "free the disk" in line
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "stage0-start\n"
    whole = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert whole == {"latest", "stage0-start"}


def test_what_a_training_begins_with(failing, training, tmp_path, monkeypatch):
    monkeypatch.setattr(VLMModel, "save_pretrained", full)
    line = failing(*training)
    assert line.startswith(f"error: cannot write the model to {tmp_path}/run/checkpoints/") and "free the disk" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "model").exists()


def test_the_model_of_a_training(failing, training, tmp_path, monkeypatch):
    """What could be written before stays, and the run goes on from there when there is room again."""
    real = VLMModel.save_pretrained

    def full_at_the_end(self: VLMModel, folder: Path, **options: object) -> None:
        write = real if folder.parent.parent.name == "checkpoints" else full
        write(self, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(VLMModel, "save_pretrained", full_at_the_end)
        line = failing(*training)
    assert line.startswith(f"error: cannot write the model to {tmp_path}/run/model: ") and "free the disk" in line
    assert not [path for path in (tmp_path / "run").iterdir() if "model" in path.name]
    assert run([*training, "--resume"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
