"""What DeepSpeed is told: "auto" is filled in, contradictions name both values, batches divide or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.train.config import Config, load_config
from vlm.train.deepspeed_config import deepspeed_config, micro_batch_size

YAML = """\
model: {vision: "timm:vit_tiny_patch16_224", text: gpt2}
data: {train: shards}
stages:
  - {objective: contrastive, steps: 5, batch: 8}
  - {objective: joint, steps: 7, batch: 4, lr: 5e-4}
"""


@pytest.fixture
def config_with(tmp_path: Path):
    """The config above with overrides."""

    def load(*overrides: str) -> Config:
        (tmp_path / "run.yaml").write_text(YAML, encoding="utf-8")
        return load_config(tmp_path / "run.yaml", list(overrides))

    return load


def test_deepspeed_numbers(config_with):
    config = config_with("stages.0.batch=48", "stages.0.micro_batch=4", "zero=2", "precision=fp32")
    told = deepspeed_config(config, config.stages[0], world_size=3)
    assert told["train_batch_size"] == 48
    assert told["train_micro_batch_size_per_gpu"] == 4
    assert told["gradient_accumulation_steps"] == 4
    assert told["zero_optimization"]["stage"] == 2
    assert not told["bf16"]["enabled"] and not told["fp16"]["enabled"] and "torch_autocast" not in told
    assert told["gradient_clipping"] == 1.0
    assert "optimizer" not in told and "scheduler" not in told


def test_precision(config_with):
    config = config_with()
    told = deepspeed_config(config, config.stages[0], world_size=1)
    assert told["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and not told["bf16"]["enabled"]
    for overrides in (["precision=fp16"], ["deepspeed={bf16: {enabled: true}}"]):
        config = config_with(*overrides)
        with pytest.raises(UsageError, match="use zero 1, 2 or 3"):
            deepspeed_config(config, config.stages[0], world_size=1)
        config = config_with(*overrides, "zero=1")
        told = deepspeed_config(config, config.stages[0], world_size=1)
        assert "torch_autocast" not in told and told["fp16"]["enabled"] != told["bf16"]["enabled"]
    config = config_with("deepspeed={bf16: {enabled: false}}")
    assert deepspeed_config(config, config.stages[0], world_size=1)["torch_autocast"]["enabled"]


def test_batch_that_does_not_divide(config_with):
    config = config_with("stages.0.batch=50", "stages.0.micro_batch=10")
    with pytest.raises(UsageError, match="over 3 processes × micro_batch 10 = 30; use batch 30 or 60"):
        micro_batch_size(config.stages[0], 3)
    with pytest.raises(UsageError, match="use batch 16"):
        micro_batch_size(config_with("stages.0.batch=8").stages[0], 16)


def test_auto_is_filled_or_left_to_deepspeed(config_with, tmp_path):
    given = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.05, "betas": "auto"}},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    config = config_with(f"deepspeed={file}", "zero=1", "stages.0.lr=0.25")
    told = deepspeed_config(config, config.stages[0], world_size=2)
    assert (told["train_batch_size"], told["gradient_accumulation_steps"]) == (8, 1)
    params = {"lr": 0.25, "weight_decay": 0.05, "betas": [0.9, 0.95], "eps": 1e-8}
    assert told["optimizer"] == {"type": "AdamW", "params": params}
    assert told["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert told["bf16"] == {"enabled": True} and "torch_autocast" not in told


def test_a_mismatch_lists_both_values(config_with):
    config = config_with("deepspeed.zero_optimization.stage=3", "zero=1")
    with pytest.raises(UsageError, match="zero_optimization.stage is 3, and zero of the contrastive stage is 1"):
        deepspeed_config(config, config.stages[0], world_size=1)
    config = config_with("deepspeed={train_micro_batch_size_per_gpu: 2}")
    with pytest.raises(UsageError, match="_batch_size_per_gpu is 2, and micro_batch of the joint stage is 4"):
        deepspeed_config(config, config.stages[1], world_size=1)


def test_deepspeed_file_faults(config_with, tmp_path):
    for text, words in (("{", "not valid JSON"), ("[1]", "holds a list"), (None, "cannot be read")):
        file = tmp_path / "ds.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, encoding="utf-8")
        config = config_with(f"deepspeed={file}")
        with pytest.raises(UsageError, match=words):
            deepspeed_config(config, config.stages[0], world_size=1)


def test_deepspeed_takes_the_result(config_with):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = config_with("zero=2", "deepspeed={zero_optimization: {overlap_comm: false}}")
    parsed = DeepSpeedConfig(deepspeed_config(config, config.stages[0], world_size=1))
    assert (parsed.train_batch_size, parsed.zero_config.stage, parsed.bfloat16_config.enabled) == (8, 2, False)


@pytest.mark.parametrize("overrides", [[], ["stages.0.micro_batch=2"], ["stages.0.batch=24", "stages.0.micro_batch=4"]])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batch_is_what_all_ranks_see_in_a_step(config_with, overrides, world_size):
    stage = config_with(*overrides).stages[0]
    told = deepspeed_config(config_with(*overrides), stage, world_size)
    assert told["train_batch_size"] == stage.batch
    assert told["train_micro_batch_size_per_gpu"] * told["gradient_accumulation_steps"] * world_size == stage.batch


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{train_batch_size: 9}", "train_batch_size is 9, and batch of the contrastive stage is 8"),
        ("{gradient_clipping: 0.5}", "gradient_clipping is 0.5, and clip of the contrastive stage is 1.0"),
        ("{fp16: {enabled: true}}", "fp16.enabled is True, and precision fp16 of the contrastive stage is False"),
        (
            "{optimizer: {type: AdamW, params: {lr: 0.5}}}",
            "optimizer.params.lr is 0.5, and lr of the contrastive stage",
        ),
        ("{optimizer: {type: SGD}}", "optimizer.type is 'SGD', and optimizer of the contrastive stage is 'AdamW'"),
        (
            "{optimizer: {params: {betas: [0.9, 0.999]}}}",
            "betas is \\[0.9, 0.999\\], and betas of the contrastive stage",
        ),
        ("{optimizer: {type: AdamW, params: {momentum: 0.9}}}", "optimizer.params.momentum is set, and the optimizers"),
        ("{scheduler: {type: WarmupLR}}", "scheduler is set, and warmup 0.05 and schedule cosine of the contrastive"),
        ("{zero_optimization: 2}", "zero_optimization is 2; it should be an object"),
    ],
)
def test_every_contradiction_is_named(config_with, given, words):
    config = config_with(f"deepspeed={given}")
    with pytest.raises(UsageError, match=words) as caught:
        deepspeed_config(config, config.stages[0], world_size=1)
    assert "\n" not in str(caught.value)


def test_what_is_given_is_not_changed(config_with):
    config = config_with("deepspeed={zero_optimization: {stage: auto}}", "zero=1")
    deepspeed_config(config, config.stages[0], world_size=1)
    assert config.deepspeed == {"zero_optimization": {"stage": "auto"}}


def test_muon_under_zero_3_gets_whole_gradients(config_with):
    for zero, optimizer, expected in ((3, "muon", False), (2, "muon", None), (3, "adamw", None)):
        config = config_with(f"zero={zero}", f"stages.0.optimizer={optimizer}")
        told = deepspeed_config(config, config.stages[0], world_size=1)
        assert told["zero_optimization"].get("reduce_scatter") is expected


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_muons_updates_are_not_clipped(config_with, zero):
    config = config_with(f"zero={zero}", "stages.0.optimizer=muon", "stages.0.clip=1.0")
    assert deepspeed_config(config, config.stages[0], world_size=1)["gradient_clipping"] == 0.0
