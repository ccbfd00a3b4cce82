"""Processes that cut up a model read a part each, hold a part each, and compute together what one computes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from ranks import run_ranks
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import modeling_utils

from vlm.errors import UsageError
from vlm.quantization import quantize
from vlm.saving import read, save
from vlm.tensor_parallel import check

CUT = "gemma3_text gpt_neox granite llama mistral mixtral olmo2 olmoe opt phi3 qwen2 qwen3 qwen3_moe smollm3 stablelm xglm"
UNCUT = ("gpt2", "bert", "modernbert")
EXPERTS = "llama with experts in the adapters"
PARTS = ("language_model", "adapters")
WORDS = 291  # which two processes do not divide


@pytest.fixture(scope="module")
def told(make_model, make_processor, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Of a model of each family, what each of two processes tells that read it."""
    folder = tmp_path_factory.mktemp("cut")
    names = [*CUT.split(), EXPERTS]
    for name in names:
        adapter = {"experts": 3, "feed_forward": 1.0} if name == EXPERTS else {"qk_norm": name == "qwen3"}
        model = make_model(name.split()[0], gate_init=1.0, **adapter)
        if name in ("qwen2", "granite"):
            model.resize_token_embeddings(WORDS)
        save(model, make_processor(), folder / name)
    run_ranks(2, __file__, str(folder), *names)
    both = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {name: list(each) for name, *each in zip(names, *both, strict=True)}


@pytest.mark.parametrize("name", [*CUT.split(), EXPERTS])
def test_two_compute_what_one_computes(told, name):
    """Logits, with pictures and without, close to those of the whole model, and the same in both processes, bit for bit."""
    for one in told[name]:
        assert one["wrong"] < 1e-5 * one["largest"], one
    assert told[name][0]["bits"] == told[name][1]["bits"]


@pytest.mark.parametrize("name", [*CUT.split(), EXPERTS])
def test_each_reads_and_holds_about_half(told, name):
    """Of the language model's and the adapters' bytes; OPT's positions, large in a small model, are whole."""
    for one in told[name]:
        for part in PARTS:
            most = 0.85 if (name, part) == ("opt", "language_model") else 0.53
            assert 0.47 < one["held"][part] <= most, (part, one)
            assert 0.47 < one["read"][part] <= most, (part, one)
        assert one["held"]["vision"] == one["read"]["vision"] == 1
    for part in PARTS:
        assert sum(one["held"][part] for one in told[name]) >= 1


# What is refused


@pytest.mark.parametrize("name", UNCUT)
def test_a_family_that_cannot_be_cut_is_refused_by_name(make_model, name):
    with pytest.raises(UsageError, match=f"family '{name}' cannot be cut for tensor_parallel 2; load it whole, or use"):
        check(make_model(name).config, 2)


@pytest.mark.parametrize(
    ("name", "size", "adapter", "refused"),
    [
        ("qwen3", 3, {}, "tensor_parallel 3 does not divide the 4 heads of the language model; use a divisor of 4"),
        ("qwen3", 4, {}, "tensor_parallel 4 does not divide the 2 key/value heads of the language model"),
        ("qwen3", 2, {"heads": 1}, "tensor_parallel 2 does not divide the 1 heads of the adapters"),
        (
            "qwen3",
            2,
            {"heads": 4, "kv_heads": 1},
            "tensor_parallel 2 does not divide the 1 key/value heads of the adapters",
        ),
        (
            "qwen3",
            2,
            {"feed_forward": 0.1},
            "tensor_parallel 2 does not divide the 3 feed-forward features of the adapters",
        ),
        (
            "phi3",
            32,
            {"heads": 32},
            "tensor_parallel 32 does not divide the 48 intermediate_size of the language model",
        ),
        ("qwen3_moe", 16, {"heads": 16}, "does not divide the 4 heads of the language model"),
    ],
)
def test_what_cannot_be_shared_is_refused(make_model, name, size, adapter, refused):
    with pytest.raises(UsageError, match=refused):
        check(make_model(name, **adapter).config, size)


def test_a_quantized_model_is_refused(make_model):
    model = make_model()
    quantize(model, "int8")
    with pytest.raises(
        UsageError, match="the model is quantized to int8 and tensor_parallel is 2; cut the full-precision one"
    ):
        check(model.config, 2)


def test_an_old_transformers_is_refused(make_model, monkeypatch):
    config = make_model().config
    monkeypatch.setattr(transformers, "__version__", "5.21.3")
    with pytest.raises(
        UsageError, match="tensor_parallel 2 needs transformers 5.22 and 5.21.3 is installed; pip install -U"
    ):
        check(config, 2)
    monkeypatch.setattr(transformers, "__version__", "6.0.0.dev0")
    check(config, 2)


# What the processes run


class Counted:
    """A safetensors file that counts the bytes that are taken of each part of the model."""

    taken: dict[str, int] = {}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._file = OPEN(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, key: str) -> CountedSlice:
        return CountedSlice(self._file.get_slice(key), key.partition(".")[0])


class CountedSlice:
    """A tensor in such a file."""

    def __init__(self, inner: Any, part: str) -> None:
        self._inner, self._part = inner, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, place: Any) -> torch.Tensor:
        tensor = self._inner[place]
        Counted.taken[self._part] = Counted.taken.get(self._part, 0) + tensor.nbytes
        return tensor


OPEN = modeling_utils.safe_open


def compare(folder: str) -> dict[str, Any]:
    """How what this process has of a model compares to the whole of it."""
    whole, _ = read(folder)
    Counted.taken.clear()
    part, _ = read(folder, tensor_parallel=dist.get_world_size())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 288, (2, 12), generator=generator)
    ids[:, 0] = 3
    seen = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    with torch.inference_mode():
        both = [[model.eval()(ids, **inputs).logits for inputs in ({}, seen)] for model in (whole, part)]
    expected, found = (torch.cat(logits) for logits in both)
    assert not torch.equal(expected[:2], expected[2:]), "pictures change what is said"
    return {
        "wrong": float((expected - found).abs().max()),
        "largest": float(expected.abs().max()),
        "bits": hashlib.sha256(found.numpy().tobytes()).hexdigest(),
        "held": {name: size_of(part, name) / size_of(whole, name) for name in (*PARTS, "vision")},
        "read": {name: Counted.taken[name] / size_of(whole, name) for name in (*PARTS, "vision")},
    }


def size_of(model: torch.nn.Module, part: str) -> int:
    """Bytes of a part's weights in this process."""
    weights = dict.fromkeys(model.get_submodule(part).parameters())
    return sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in weights)


def look(folder: Path, names: list[str]) -> None:
    """What one process of two tells of each model, into a file of its own."""
    dist.init_process_group("gloo")
    with mock.patch.object(modeling_utils, "safe_open", Counted):
        told = [compare(str(folder / name)) for name in names]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    look(Path(sys.argv[1]), sys.argv[2:])
