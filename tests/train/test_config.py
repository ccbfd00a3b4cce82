"""Configs: what they accept, what they refuse and with which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vlm.configuration import AdapterConfig
from vlm.errors import UsageError
from vlm.settings import annotated_yaml
from vlm.train.config import Config, load_config, packaged_configs
from vlm.train.config_model import Adapter

MINIMAL = """\
out: runs/x
model:
  vision: {name: "timm:vit_tiny_patch16_224", image_size: 64}
  text: {family: qwen3, width: 64, depth: 2, heads: 2}
data: {train: shards}
stages:
  - {objective: contrastive, steps: 5, batch: 8}
  - {objective: joint, steps: 7, batch: 4, lr: 5e-4}
"""


@pytest.fixture
def yaml_file(tmp_path: Path):
    """Writes a config file and gives its path."""

    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_and_defaults(yaml_file):
    config = load_config(yaml_file(MINIMAL))
    assert config.stages[1].lr == 5e-4, "1e-3 without a dot is a number"
    assert config.model.vision.image_size == [64, 64]
    assert [source.path for source in config.data.train] == ["shards"]
    assert (config.zero, config.precision, config.checkpoint.keep) == (0, "bf16", 3)


@pytest.mark.parametrize(
    ("broken", "line", "words"),
    [
        ("outt: x", 9, ["outt is not a known key", "did you mean out?"]),
        ("seed: many", 9, ["seed is many", "a whole number"]),
        ("zero: true", 9, ["zero is true", "a whole number"]),
        ("zero: 4", 9, ["zero is 4", "less than or equal to 3"]),
        ("precision: int8", 9, ["precision is int8", "'bf16'"]),
        ("checkpoint: {evry: 5}", 9, ["checkpoint.evry", "did you mean every?"]),
        ("checkpoint:\n  keep: 2\n  every: never", 11, ["checkpoint.every is never", "a whole number"]),
        ("minutes: 5", 9, ["minutes 5", "2 of 2 stages count steps"]),
    ],
)
def test_error_names_key_and_line(yaml_file, broken, line, words):
    text = error_of(yaml_file(MINIMAL + broken + "\n"))
    assert f"run.yaml line {line}: " in text or broken.startswith("minutes")
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{objective: joint}", "neither steps nor minutes"),
        ("{objective: joint, steps: 3, minutes: 2}", "steps 3 and minutes 2 are both set"),
        ("{objective: joint, steps: 3, batch: 7, micro_batch: 4}", "batch 7 is no multiple of micro_batch 4"),
        ("{objective: joint, steps: 3, mask_share: 0.3}", "mask_share belongs to objective mlm, not joint"),
        ("{objective: clm, steps: 3, contrastive_weight: 1.0}", "contrastive_weight belongs to objective joint"),
        ("{objective: joint, steps: 3, loss: siglip}", "loss is siglip and contrastive_weight is 0"),
        ("{objektive: joint, steps: 3}", "stages.0.objective is missing"),
    ],
)
def test_contradictions_within_a_stage(yaml_file, stage, words):
    text = error_of(yaml_file(MINIMAL.split("stages:")[0] + f"stages:\n  - {stage}\n"))
    assert "run.yaml line 7: stages.0" in text and words in text


def test_missing_data_says_what_to_add(yaml_file):
    text = error_of(yaml_file(MINIMAL.replace("data: {train: shards}\n", "")))
    assert "data.train is missing; add data.train=" in text


def test_saved_model_and_towers_contradict(yaml_file):
    assert "model={path: …}" in error_of(yaml_file(MINIMAL), "model.path=runs/a/model")
    assert load_config(yaml_file(MINIMAL), ["model={path: runs/a/model}"]).model.path == "runs/a/model"


@pytest.mark.parametrize("setting", ["adapter: {every: 3}", "embedding_dim: 64", "tokenizer: {vocab_size: 999}"])
def test_a_saved_model_brings_its_own(yaml_file, setting):
    name = setting.partition(":")[0]
    text = error_of(yaml_file(MINIMAL), f"model={{path: runs/a/model, {setting}}}")
    assert f"model.path and model.{name} are both set, and a saved model brings its own; remove model.{name}" in text


def test_a_tokenizer_that_exists_has_its_own_size(yaml_file):
    path = yaml_file(MINIMAL)
    text = error_of(path, "model.tokenizer={path: words, vocab_size: 999}")
    assert (
        "model.tokenizer: vocab_size is 999, and the tokenizer words has its own; remove one of vocab_size and path"
        in text
    )
    assert load_config(path, ["model.tokenizer={path: words, vocab_size: 4096}"]).model.tokenizer.path == "words"


def test_the_config_of_a_run_from_a_saved_model_reads_back(yaml_file):
    config = load_config(yaml_file(MINIMAL), ["model={path: runs/a/model}"])
    assert load_config(yaml_file(annotated_yaml(config), "config.yaml")) == config


@pytest.mark.parametrize("setting", ["keep_best: true", "patience: 3"])
def test_nothing_to_validate_on(yaml_file, setting):
    text = error_of(yaml_file(MINIMAL + f"validation: {{{setting}}}\n"))
    name = setting.partition(":")[0]
    assert f"validation.{name} is set, and there is nothing to validate on; set data.val, or remove it" in text


def test_faults_of_yaml_itself(yaml_file):
    assert "run.yaml line 2: not valid YAML" in error_of(yaml_file("out: a\nmodel: {vision: ]\n"))
    assert "set twice, first at" in error_of(yaml_file(MINIMAL + "out: b\n"))
    assert "a config is a mapping" in error_of(yaml_file("- a\n- b\n"))
    assert "does not exist" in error_of(Path("no/such.yaml"))


def test_overrides(yaml_file):
    path = yaml_file(MINIMAL)
    config = load_config(
        path,
        ["stages.0.steps=10", "out=a b", "vision.depth=3", "text=gpt2", "stages.1.lora.r=4", "data.train={00..12}.tar"],
    )
    assert config.stages[0].steps == 10 and config.stages[1].steps == 7
    assert config.out == "a b"
    assert config.model.vision.depth == 3 and config.model.vision.image_size == [64, 64]
    assert config.model.text == "gpt2"
    assert config.stages[1].lora.r == 4 and config.stages[1].lora.alpha is None
    assert config.data.train[0].path == "{00..12}.tar"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.2.steps=1", "stages is a list of 2"),
        ("steps", "write key=value"),
        ("stages.0.step=1", "command line: stages.0.step is not a known key; did you mean steps?"),
        ("out.name=1", "out is 'runs/x', not a mapping"),
        ("text.width=big", "command line: model.text.width is big; it should be a whole number"),
    ],
)
def test_override_errors(yaml_file, override, words):
    assert words in error_of(yaml_file(MINIMAL), override)


def test_command_line_chooses_between_steps_and_minutes(yaml_file):
    stage = load_config(yaml_file(MINIMAL), ["stages.0.minutes=2"]).stages[0]
    assert (stage.steps, stage.minutes) == (None, 2)
    assert "both set" in error_of(yaml_file(MINIMAL), "stages.0.minutes=2", "stages.0.steps=3")


def test_minutes_are_shared_in_proportion(yaml_file):
    overrides = ["stages.0.minutes=1", "stages.1.minutes=3", "minutes=60"]
    assert [stage.minutes for stage in load_config(yaml_file(MINIMAL), overrides).stages] == [15, 45]


def test_base_is_merged_and_lists_replaced(yaml_file):
    yaml_file(MINIMAL, "base.yaml")
    top = yaml_file("base: base.yaml\nmodel: {text: {depth: 9}}\nstages:\n  - {objective: joint, steps: 1, bach: 3}\n")
    text = error_of(top)
    assert "run.yaml line 4: stages.0.bach is not a known key" in text
    config = load_config(top, ["stages.0={objective: joint, steps: 1}"])
    assert config.model.text.depth == 9 and config.model.text.width == 64
    assert len(config.stages) == 1 and config.out == "runs/x"


def test_errors_in_a_base_name_its_file(yaml_file):
    yaml_file(MINIMAL + "sede: 1\n", "base.yaml")
    assert "base.yaml line 9: sede" in error_of(yaml_file("base: base.yaml\n"))
    assert "base nothing.yaml does not exist" in error_of(yaml_file("base: nothing.yaml\n"))
    assert "builds on this file" in error_of(yaml_file("base: run.yaml\n"))


def test_sources_with_weights(yaml_file):
    path = yaml_file(MINIMAL.replace("train: shards", "train: [a, {path: b, weight: 2.5}]"))
    assert [(source.path, source.weight) for source in load_config(path).data.train] == [("a", 1.0), ("b", 2.5)]


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_packaged_configs_load_and_survive_their_own_documentation(name, tmp_path):
    config = load_config(name, ["data.train=shards", "data.val=shards"])
    copy = tmp_path / "config.yaml"
    copy.write_text(annotated_yaml(config), encoding="utf-8")
    assert load_config(copy) == config
    assert load_config(f"configs/{name}.yaml", ["data.train=shards", "data.val=shards"]) == config


def test_every_field_is_documented():
    seen = []

    def walk(section):
        for name, info in section.model_fields.items():
            assert info.description, f"{section.__name__}.{name}"
            seen.append(name)
        for inner in section.__subclasses__():
            walk(inner)

    walk(Config.__mro__[1])
    assert len(seen) > 60


def test_adapter_section_is_the_models_own():
    theirs = {field.name: field.default for field in dataclasses.fields(AdapterConfig)}
    assert {name: info.default for name, info in Adapter.model_fields.items()} == theirs


def test_a_clip_that_muon_would_ignore_is_refused(yaml_file):
    config = yaml_file(MINIMAL)
    assert load_config(config, ["stages.0.optimizer=muon", "stages.0.clip=0"]).stages[0].clip == 0
    with pytest.raises(UsageError, match="stages.0: clip is 0.5, and optimizer muon has no limit"):
        load_config(config, ["stages.0.optimizer=muon", "stages.0.clip=0.5"])
