"""Small data sets, a saved model and whole runs for the tests of training."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm.saving import read, save
from vlm.shards import ShardWriter
from vlm.train.config import Config
from vlm.train.loop import train

PICTURES, BYTES = "pictures", "bytes"


@pytest.fixture(scope="session")
def make_shards(make_picture):
    """Writes samples, key -> JSON fields, and gives the folder. `pictures`: how many; `bytes`: one that is no picture."""

    def write(folder: Path, samples: Mapping[str, Mapping[str, Any]]) -> str:
        with ShardWriter(folder) as writer:
            for number, (key, fields) in enumerate(samples.items()):
                parts = {}
                for place in range(fields.get(PICTURES, 0)):
                    file = io.BytesIO()
                    make_picture(10 * number + place).save(file, "PNG")
                    parts[f"{place}.png"] = file.getvalue()
                if BYTES in fields:
                    parts["png"] = fields[BYTES]
                told = {name: value for name, value in fields.items() if name not in (PICTURES, BYTES)}
                writer.write(key, parts | {"json": json.dumps(told).encode()})
        return str(folder)

    return write


@pytest.fixture(scope="session")
def pairs(make_shards, tmp_path_factory) -> str:
    """Twelve pictures with a caption, two questions and a plain text each."""
    samples = {
        f"{index:02d}": {
            "pictures": 1,
            "caption": f"picture {index}",
            "qa": [
                {"question": "how many?", "answer": str(index), "type": "count"},
                {"question": "is it red?", "answer": "yes" if index % 2 else "no", "type": "colour"},
            ],
            "text": f"{index} plain words",
        }
        for index in range(12)
    }
    return make_shards(tmp_path_factory.mktemp("pairs") / "set", samples)


@pytest.fixture(scope="session")
def save_model(make_model, make_processor):
    """Saves a tiny model with its processor and gives the folder."""

    def write(folder: Path, family: str = "qwen3", **adapter: Any) -> str:
        save(make_model(family, **adapter), make_processor(), folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def base(save_model, tmp_path_factory) -> str:
    """A saved model with open gates."""
    return save_model(tmp_path_factory.mktemp("base") / "model", gate_init=0.5)


@pytest.fixture(scope="session")
def shallow(save_model, tmp_path_factory) -> str:
    """A saved model with one adapter: ZeRO-3 takes a millisecond for every module."""
    return save_model(tmp_path_factory.mktemp("shallow") / "model", every=3, gate_init=0.5)


@pytest.fixture(scope="session")
def make_config(base, pairs):
    """A config that goes on from `base` with `pairs`, in fp32 and one process a rank, unless told otherwise."""

    def make(out: Path, *stages: Mapping[str, Any], **fields: Any) -> Config:
        data = {"train": pairs, "workers": 0} | fields.pop("data", {})
        whole = {"model": {"path": base}, "precision": "fp32", "out": str(out)} | fields
        listed = [{"steps": 2, "batch": 4, "warmup": 0.0} | dict(stage) for stage in stages]
        return Config.model_validate(whole | {"data": data, "stages": listed})

    return make


class Outcome:
    """What a run left behind."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        self.steps = [line for line in self.lines if "event" not in line]
        self.losses = [line["loss"] for line in self.steps]

    def events(self, name: str) -> list[dict]:
        """The events of one kind."""
        return [line for line in self.lines if line.get("event") == name]

    def weights(self) -> dict:
        """The weights of the trained model."""
        return read(self.out / "model")[0].state_dict()


@pytest.fixture(scope="session")
def outcome():
    """`Outcome`."""
    return Outcome


@pytest.fixture
def run(make_config, tmp_path):
    """Trains some stages in this process and gives what the run left. into: another folder than `tmp_path`/run."""

    def trained(*stages: Mapping[str, Any], into: str = "run", resume: bool = False, **fields: Any) -> Outcome:
        train(make_config(tmp_path / into, *stages, **fields), resume=resume)
        return Outcome(tmp_path / into)

    return trained
