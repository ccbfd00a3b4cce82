"""What trains, what decays, how fast: patterns, groups of the optimizers, schedules."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.errors import UsageError
from vlm.lora import add_lora
from vlm.train.config_stage import Stage
from vlm.train.objectives import OBJECTIVES
from vlm.train.optimization import BETAS, choose_trainable, make_optimizer, rate, set_rates
from vlm.train.summary import training_table


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


@pytest.mark.parametrize(
    ("objective", "fields", "tower"),
    [
        ("joint", {"freeze": ["language_model"]}, "text"),
        ("joint", {"train": ["adapters"]}, "text"),
        ("clm", {"lora": {"r": 2, "towers": ["vision"]}}, "vision"),
        ("clm", {"lora": {"r": 2, "towers": ["text", "vision"]}}, "vision"),
    ],
)
def test_lora_that_would_learn_nothing_is_refused(choose, objective, fields, tower):
    stage = stage_of(objective, **{"lora": {"r": 2}, **fields})
    words = (
        rf"objective {objective} none of the \d+ lora parameters of tower {tower} to train; .*: leave it out of freeze"
    )
    with pytest.raises(UsageError, match=words) as refusal:
        choose(stage)
    assert str(stage.train) in str(refusal.value) and str(stage.freeze) in str(refusal.value)


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
        with torch.compiler.set_stance("force_eager"):  # as runs do: DeepSpeed would compile Muon
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


# Rates by pattern

RATES = {"vision": 0.1, "*.embed_tokens.*": 0.5, "language_model": 2.0}


def expected_factor(name: str) -> float:
    if name.startswith("vision."):
        return 0.1
    if name.startswith("language_model."):
        return 0.5 if ".embed_tokens." in name else 2.0
    return 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_multiply_and_the_first_match_counts(choose, optimizer):
    plain, with_rates = stage_of("joint", optimizer=optimizer), stage_of("joint", optimizer=optimizer, rates=RATES)
    model, names = choose(with_rates)
    told = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[dict[str, tuple]] = []
    for stage in (plain, with_rates):
        made = make_optimizer(model, stage)
        set_rates(made, 0.5)
        found.append(
            {
                told[id(parameter)]: (group["lr"], group["weight_decay"])
                for group in made.param_groups
                for parameter in group["params"]
            }
        )
    before, after = found
    assert before.keys() == after.keys() == names
    for name in names:
        assert after[name][0] == pytest.approx(before[name][0] * expected_factor(name), rel=1e-12)
        assert after[name][1] == before[name][1]
    assert {expected_factor(name) for name in names} == {0.1, 0.5, 1.0, 2.0}


def test_a_rate_moves_a_weight_by_as_much(choose):
    """AdamW's first step is of the size of the rate itself, whatever the gradient."""
    stage = stage_of("joint", rates={"adapters": 0.25}, weight_decay=0.0)
    model, _ = choose(stage)
    optimizer = make_optimizer(model, stage)
    set_rates(optimizer, 1e-2)
    weights = {part: dict(model.named_parameters())[name] for part, name in PROBES.items()}
    before = {part: weight.detach().clone() for part, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    moved = {part: float((before[part] - weight.detach()).mean()) for part, weight in weights.items()}
    assert moved == pytest.approx({"adapter": 0.25e-2, "text": 1e-2}, rel=1e-3)


PROBES = {"adapter": "adapters.0.attention.q_proj.weight", "text": "language_model.model.layers.0.mlp.up_proj.weight"}


def test_rates_that_decide_nothing(choose):
    _, names = choose(stage_of("clm"))
    words = f"rates pattern 'vision' matches none of {len(names)} parameters that train; .* begin with language_model"
    with pytest.raises(UsageError, match=words):
        choose(stage_of("clm", rates={"vision": 0.1}))
    with pytest.raises(UsageError, match="rates pattern 'adapters' matches none of"):
        choose(stage_of("joint", freeze=["adapters"], rates={"adapters": 0.1}))
    norms = [name for name in names if name.endswith("norm.weight")]
    late = rf"'\*norm.weight' comes too late: all {len(norms)} parameters .* by the patterns before it, such as '\*'; put it"
    with pytest.raises(UsageError, match=late):
        choose(stage_of("clm", rates={"*": 0.5, "*norm.weight": 0.1}))


def test_the_table_tells_the_rates(choose):
    stage = stage_of("joint", rates=RATES, freeze=["adapters"])
    model, _ = choose(stage)
    rows = {line.split()[0]: line for line in training_table(model, stage).splitlines()}
    assert rows["vision"].endswith(" 0.01") and rows["language_model"].endswith(" 0.05, 0.2")
    assert rows["adapters"].endswith(" –") and rows["total"].endswith(" 0.01, 0.05, 0.2")


# Schedules


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0.2: 0.1, 0.4: 0.1 * (1 + math.cos(math.pi / 4)) / 2, 0.6: 0.05, 1.0: 0.0}),
        ("linear", {0.2: 0.1, 0.4: 0.075, 0.6: 0.05, 1.0: 0.0}),
        ("wsd", {0.2: 0.1, 0.6: 0.1, 0.8: 0.1, 0.85: 0.075, 0.9: 0.05, 1.0: 0.0}),
        ("constant", {0.2: 0.1, 0.4: 0.1, 0.6: 0.1, 1.0: 0.1}),
    ],
)
def test_schedules(schedule, values):
    stage = stage_of(schedule=schedule, warmup=0.2)
    climb = {0.0: 0.0, 0.05: 0.025, 0.1: 0.05}
    for share, expected in (climb | values).items():
        assert rate(stage, share) == pytest.approx(expected, abs=1e-12)


def test_wsd_goes_down_from_where_a_long_climb_has_come_to():
    stage = stage_of(schedule="wsd", warmup=0.9)
    assert [rate(stage, share) for share in (0.45, 0.9, 0.95, 1.0)] == pytest.approx([0.05, 0.1, 0.05, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warmup_and_nothing_but_warmup(schedule, warmup):
    stage = stage_of(schedule=schedule, warmup=warmup)
    assert rate(stage, 0.0) == (0.1 if warmup == 0 else 0.0)
    assert rate(stage, 0.5) == pytest.approx(0.05 if warmup or schedule in ("cosine", "linear") else 0.1)
    assert 0.0 <= rate(stage, 1.0) <= 0.1
