"""What trains, what decays, how fast: patterns, groups of the optimizers, schedules."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.errors import UsageError
from vlm.lora import add_lora
from vlm.train.config import Stage
from vlm.train.objectives import OBJECTIVES
from vlm.train.optimization import BETAS, choose_trainable, make_optimizer, rate, set_rates


def stage_of(objective: str = "joint", **fields) -> Stage:
    return Stage.model_validate({"objective": objective, "steps": 10, "lr": 0.1, "weight_decay": 0.3, **fields})


@pytest.fixture
def choose(make_model):
    """The model of a stage after `choose_trainable`, and the parts that train: up to the first dot."""

    def chosen(stage: Stage, family: str = "qwen3", **adapter):
        model = make_model(family, **adapter)
        if stage.lora is not None:
            add_lora(model, **stage.lora.model_dump())
        choose_trainable(OBJECTIVES[stage.objective](model, stage), stage)
        return model, {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    return chosen


def parts(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


# What trains


def test_what_the_objective_reads_trains(choose):
    shared = {"image_pool", "text_projection", "logit_scale"}
    assert parts(choose(stage_of("joint"))[1]) == {"vision", "adapters", "language_model"}
    assert parts(choose(stage_of("contrastive"))[1]) == {"vision", "language_model"} | shared
    assert (
        parts(choose(stage_of("contrastive", loss="siglip"))[1]) == {"vision", "language_model", "logit_bias"} | shared
    )
    assert parts(choose(stage_of("clm"))[1]) == {"language_model"}
    assert "language_model.lm_head.weight" not in choose(stage_of("contrastive"))[1]


def test_freeze_and_train_name_parts_or_patterns(choose):
    everything = choose(stage_of())[1]
    frozen = choose(stage_of(freeze=["vision", "*.mlp.*"]))[1]
    assert frozen == {name for name in everything if not name.startswith("vision.") and ".mlp." not in name}
    only = choose(stage_of(train=["adapters", "language_model.lm_head.weight"]))[1]
    assert parts(only) == {"adapters", "language_model"} and "language_model.lm_head.weight" in only
    assert parts(choose(stage_of(train=["adapters", "vision"], freeze=["vision"]))[1]) == {"adapters"}


def test_a_part_is_named_whole(choose):
    with pytest.raises(UsageError, match="freeze pattern 'visio' matches none of .* begin with adapters, image_pool"):
        choose(stage_of(freeze=["visio"]))
    with pytest.raises(UsageError, match=r"train pattern '\*\.nothing' matches none"):
        choose(stage_of(train=["*.nothing"]))


def test_nothing_left_to_train(choose):
    with pytest.raises(UsageError, match="leave objective clm nothing to train, .*; it reads .* language_model"):
        choose(stage_of("clm", train=["vision"]))


def test_with_lora_the_updates_alone_of_the_language_model_train(choose):
    model, names = choose(stage_of(lora={"r": 2}, freeze=["vision"]))
    assert parts(names) == {"adapters", "language_model"}
    assert all("lora_" in name for name in names if name.startswith("language_model."))
    assert {name for name, _ in model.named_parameters() if "lora_" in name} <= names


def test_what_a_stage_before_froze_trains_again(choose, make_model):
    model = make_model()
    model.requires_grad_(False)
    stage = stage_of("clm")
    choose_trainable(OBJECTIVES["clm"](model, stage), stage)
    assert all(parameter.requires_grad for parameter in model.language_model.parameters())


# Groups


def names_by(model, optimizer, key) -> dict:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict = {}
    for group in optimizer.param_groups:
        found.setdefault(group[key], set()).update(names[id(parameter)] for parameter in group["params"])
    return found


def test_decay_is_for_matrices_alone(choose):
    model, names = choose(stage_of("joint"), positions="learned", latents=3, qk_norm=True)
    decays = names_by(model, make_optimizer(model, stage_of("joint")), "weight_decay")
    assert decays.keys() == {0.0, 0.3} and decays[0.0] | decays[0.3] == names
    assert decays[0.0].isdisjoint(decays[0.3])
    for plain in (
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "vision.trunk.pos_embed",
        "vision.trunk.cls_token",
        "vision.trunk.patch_embed.proj.bias",
        "adapters.0.attention_gate",
        "image_positions",
        "resampler.latents",
    ):
        assert plain in decays[0.0]
    for matrix in (
        "language_model.lm_head.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "vision.trunk.patch_embed.proj.weight",
        "adapters.0.attention.q_proj.weight",
    ):
        assert matrix in decays[0.3]


def test_a_tied_head_is_an_embedding(choose):
    model, _ = choose(stage_of("clm"), "qwen2")
    decays = names_by(model, make_optimizer(model, stage_of("clm")), "weight_decay")
    assert "language_model.model.embed_tokens.weight" in decays[0.0]


def test_muon_takes_the_hidden_matrices(choose):
    stage = stage_of("joint", optimizer="muon")
    model, names = choose(stage)
    optimizer = make_optimizer(model, stage)
    by = names_by(model, optimizer, "use_muon")
    assert by[True] | by[False] == names and by[True].isdisjoint(by[False])
    shapes = {name: parameter for name, parameter in model.named_parameters()}
    assert all(shapes[name].ndim == 2 for name in by[True])
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} <= by[False]
    assert "vision.trunk.patch_embed.proj.weight" in by[False], "four dimensions"
    assert {"adapters.0.attention.q_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"} <= by[True]
    assert all(tuple(group["betas"]) == BETAS for group in optimizer.param_groups if not group["use_muon"])


def test_muon_updates_are_of_adamws_size():
    """0.2 √max(rows, columns) on an orthogonal update: each number moves by about 0.2 lr, as AdamW's do."""
    torch.manual_seed(0)
    for rows, columns in ((64, 16), (16, 64), (32, 32)):
        layer = torch.nn.Linear(columns, rows, bias=False)
        layer.get_output_embeddings = lambda: None
        optimizer = make_optimizer(layer, stage_of(optimizer="muon", weight_decay=0.0))
        before = layer.weight.detach().clone()
        set_rates(optimizer, 0.01)
        layer.weight.grad = torch.randn(rows, columns)
        optimizer.step()
        size = float((layer.weight.detach() - before).square().mean().sqrt())
        assert 0.5 < size / (0.2 * 0.01) < 1.5


def test_rates_are_scaled_by_group(choose):
    stage = stage_of("joint", optimizer="muon")
    model, _ = choose(stage)
    optimizer = make_optimizer(model, stage)
    set_rates(optimizer, 0.5)
    assert all(group["lr"] == 0.5 * group["scale"] for group in optimizer.param_groups)
    assert {group["scale"] for group in optimizer.param_groups if not group["use_muon"]} == {1.0}


# Schedules


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0.2: 0.1, 0.4: 0.1 * (1 + math.cos(math.pi / 4)) / 2, 0.6: 0.05, 1.0: 0.0}),
        ("linear", {0.2: 0.1, 0.4: 0.075, 0.6: 0.05, 1.0: 0.0}),
        ("constant", {0.2: 0.1, 0.4: 0.1, 0.6: 0.1, 1.0: 0.1}),
    ],
)
def test_schedules(schedule, values):
    stage = stage_of(schedule=schedule, warmup=0.2)
    climb = {0.0: 0.0, 0.05: 0.025, 0.1: 0.05}
    for share, expected in (climb | values).items():
        assert rate(stage, share) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warmup_and_nothing_but_warmup(schedule, warmup):
    stage = stage_of(schedule=schedule, warmup=warmup)
    assert rate(stage, 0.0) == (0.1 if warmup == 0 else 0.0)
    assert rate(stage, 0.5) == pytest.approx(0.05 if warmup or schedule != "constant" else 0.1)
    assert 0.0 <= rate(stage, 1.0) <= 0.1
