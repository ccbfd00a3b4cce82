"""Image–text matching: its loss is the formula, its negatives are wrong and drawn as often as they are like."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.errors import UsageError
from vlm.saving import read, save
from vlm.train.config_stage import Stage
from vlm.train.contrast import Pairs
from vlm.train.loop import checkpoint_activations
from vlm.train.matching import differ, draw, pairs_with_negatives
from vlm.train.objectives import OBJECTIVES, Plan
from vlm.train.optimization import choose_trainable
from vlm.train.ranks import join
from vlm.train.step import prepare

ROWS, LENGTH = 4, 8
SETTINGS = {"objective": "joint", "steps": 1, "contrastive_weight": 0.5, "matching_weight": 0.25}


@pytest.fixture
def objective_of(make_model):
    """The joint objective on a tiny model with open gates and a head for matching."""

    def make(family: str = "qwen3", **stage):
        model = make_model(family, gate_init=0.5)
        model.add_matching_head()
        return OBJECTIVES["joint"](model, Stage.model_validate(SETTINGS | stage)).eval()

    return make


def batch_of(texts: list[list[int]], seed: int = 0) -> dict:
    """Rows with a picture each; the first of them have these texts, given as tokens, to go with it."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 280, (ROWS, LENGTH), generator=draw)
    longest = max((len(text) for text in texts), default=1)
    padded = [text + [0] * (longest - len(text)) for text in texts] or [[1]]
    real = [[1] * len(text) + [0] * (longest - len(text)) for text in texts] or [[1]]
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.arange(LENGTH).expand(ROWS, -1),
        "document_ids": torch.ones_like(ids),
        "token_image": torch.zeros_like(ids),
        "pixel_values": torch.randn(ROWS, 3, 32, 32, generator=draw),
        "image_slots": torch.arange(ROWS)[:, None],
        "pair_input_ids": torch.tensor(padded),
        "pair_attention_mask": torch.tensor(real),
        "pair_images": torch.arange(len(texts)),
    }


TEXTS = [[11, 12, 13, 1], [14, 15, 1], [16, 1], [17, 18, 19, 20, 1]]


def gradients(objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in objective.named_parameters() if value.grad is not None}


# Negatives


def test_pairs_with_equal_texts_are_no_negatives_of_each_other():
    batch = batch_of([[11, 12, 1], [13, 1], [11, 12, 1], [11, 12, 1]])
    off = ~torch.eye(4, dtype=torch.bool)
    expected = off & (torch.tensor([0, 1, 0, 0])[:, None] != torch.tensor([0, 1, 0, 0]))
    assert torch.equal(differ(batch), expected)
    assert pairs_with_negatives(batch) == 4
    # What fills up a row is no part of a text, whatever stands there.
    batch["pair_input_ids"][1, 2:] = 7
    assert torch.equal(differ(batch), expected)
    assert [pairs_with_negatives(batch_of(texts)) for texts in ([], TEXTS[:1], [[11, 1]] * 3)] == [0, 0, 0]


def pairs_of(count: int, scale: float = 3.0) -> Pairs:
    drawn = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(count, 5, generator=drawn) for _ in range(2))
    return Pairs(images, texts, torch.tensor([scale]))


def test_negatives_are_drawn_in_proportion_to_the_softmax_of_likeness():
    """The third pair says what the first says: neither ever stands in for the other, nor any for itself."""
    torch.manual_seed(0)
    batch, pairs, draws = batch_of([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[3]]), pairs_of(4), 3000
    found = torch.zeros(2, 4, 4)
    for _ in range(draws):
        chosen, texts, pictures = draw(pairs, batch, training=True)
        assert chosen.tolist() == [0, 1, 2, 3]
        found[0, chosen, texts] += 1
        found[1, chosen, pictures] += 1
    images, texts = (F.normalize(value.double(), dim=-1) for value in (pairs.images, pairs.texts))
    odds = (3.0 * images @ texts.T).exp()
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    for counted, wanted in zip(found, (odds, odds.T), strict=True):
        assert counted[same].sum() == 0
        wanted = wanted.masked_fill(same, 0.0)
        wanted = wanted / wanted.sum(dim=1, keepdim=True)
        # Four standard deviations of a share.
        assert ((counted / draws - wanted).abs() <= 4 * (wanted * (1 - wanted) / draws).sqrt()).all()
        assert wanted.max() > 2 * wanted[~same].min()


def test_what_is_much_alike_is_drawn_without_fail_and_without_overflow():
    batch, pairs = batch_of(TEXTS), pairs_of(4, scale=100.0)
    pairs = pairs._replace(texts=pairs.images)
    negatives = draw(pairs, batch, training=True)
    assert (negatives.texts != negatives.chosen).all() and (negatives.pictures != negatives.chosen).all()


def test_validation_draws_the_same_each_time_and_takes_nothing_from_the_generator():
    batch, pairs = batch_of(TEXTS), pairs_of(4)
    before = torch.get_rng_state()
    first, second = (draw(pairs, batch, training=False) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


# The loss


def formula(objective, batch: dict, readings: list[tuple[int, int, int]]) -> Tensor:
    """−log p summed over (text, picture, whether it is right), in float64, each read alone and without padding."""
    model, total = objective.model.double(), torch.zeros((), dtype=torch.float64)
    for text, picture, right in readings:
        ids = batch["pair_input_ids"][text][batch["pair_attention_mask"][text] > 0][None]
        states = model.language_model.base_model(
            input_ids=ids,
            visual=model._inputs(
                ids,
                pixel_values=batch["pixel_values"][[picture]],
                image_slots=torch.tensor([[0]]),
                token_image=torch.zeros_like(ids),
            )["visual"],
        ).last_hidden_state
        logits = states.mean(dim=1) @ model.matching_head.weight.T + model.matching_head.bias
        total = total - logits.log_softmax(dim=-1)[0, right]
    return total


@pytest.mark.parametrize("language", ["qwen3", "gpt2", "opt"])
def test_the_loss_is_the_formula(objective_of, language):
    objective, batch = objective_of(language), batch_of(TEXTS)
    loss, logs = objective(batch, Plan(5.0, mean_matches=2.0))
    plain = objective_of(language, matching_weight=0.0)(batch, Plan(5.0))[0]
    assert torch.allclose(loss, plain + 0.25 * logs["matching_loss"], rtol=1e-6)
    pairs = objective.pairs(batch)
    chosen, texts, pictures = (value.tolist() for value in draw(pairs, batch, training=False))
    readings = [(row, row, 1) for row in chosen]
    readings += [(text, row, 0) for row, text in zip(chosen, texts, strict=True)]
    readings += [(row, picture, 0) for row, picture in zip(chosen, pictures, strict=True)]
    whole = formula(objective, batch, readings) / 3 / 2.0
    assert len(readings) == 12 and torch.allclose(logs["matching_loss"].double(), whole, rtol=1e-5)


def test_the_right_pairs_alone_are_right(objective_of):
    """A head that always says yes is right once in three readings, one that always says no twice."""
    objective, batch = objective_of(), batch_of(TEXTS)
    head = objective.model.matching_head
    torch.nn.init.zeros_(head.weight)
    for says, right in ((1, 1 / 3), (0, 2 / 3)):
        head.bias.data = F.one_hot(torch.tensor(says), 2) * 10.0
        _, logs = objective(batch, Plan(1.0, mean_matches=4.0))
        assert logs["matching_accuracy"].item() == pytest.approx(right)


@pytest.mark.parametrize("texts", [[], TEXTS[:1], [[11, 1]] * 3])
def test_pairs_without_negatives_cost_nothing_and_reach_every_weight(objective_of, texts):
    objective = objective_of()
    with_negatives = gradients(objective, objective(batch_of(TEXTS), Plan(1.0))[0])
    loss, logs = objective(batch_of(texts), Plan(1.0))
    assert logs["matching_loss"] == 0 and logs["matching_accuracy"] == 0
    without = gradients(objective, loss)
    assert without.keys() == with_negatives.keys()
    head = [name for name in without if "matching_head" in name]
    assert len(head) == 2
    assert all(torch.count_nonzero(without[name]) == 0 < torch.count_nonzero(with_negatives[name]) for name in head)


def test_every_micro_batch_counts_by_its_pairs(objective_of):
    """One of four pairs, one of two, one of a lone pair: the mean over the six that have a negative."""
    join()
    objective, batches = objective_of(), [batch_of(TEXTS), batch_of(TEXTS[:2], 1), batch_of(TEXTS[:1], 2)]

    class Engine:
        module, device = objective, torch.device("cpu")

        def __call__(self, batch, plan):
            return objective(batch, plan)

    plans = prepare(Engine(), batches)
    assert [plan.mean_matches for plan in plans] == [2.0] * 3
    told = [objective(batch, plan)[1]["matching_loss"] for batch, plan in zip(batches, plans, strict=True)]
    sums = [
        objective(batch, plan._replace(mean_matches=1.0))[1]["matching_loss"]
        for batch, plan in zip(batches, plans, strict=True)
    ]
    assert torch.allclose(torch.stack(told).mean(), torch.stack(sums).sum() / 6)


def test_checkpointed_activations_change_no_gradient(objective_of):
    batch, found = batch_of(TEXTS), []
    for checkpointed in (False, True):
        objective = objective_of().train()
        if checkpointed:
            checkpoint_activations(objective.model)
        torch.manual_seed(0)
        found.append(gradients(objective, objective(batch, Plan(1.0))[0]))
    assert all(torch.allclose(found[1][name], value, atol=1e-6) for name, value in found[0].items())


def test_the_head_trains_where_it_is_asked_for(objective_of):
    for weight, trains in ((0.25, True), (0.0, False)):
        objective = objective_of(matching_weight=weight)
        choose_trainable(objective, objective.stage)
        assert objective.model.matching_head.weight.requires_grad == trains


def test_a_handful_of_pairs_is_learnt(objective_of):
    torch.manual_seed(0)
    objective, batch = objective_of(contrastive_weight=1e-3, matching_weight=1.0).train(), batch_of(TEXTS)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    for _ in range(90):
        loss, logs = objective(batch, Plan(1.0, mean_matches=4.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logs["matching_accuracy"].item() == pytest.approx(1.0) and logs["matching_loss"] < 0.1


# The model


def test_a_model_has_the_head_or_not(make_model, make_processor, tmp_path):
    plain, headed = make_model(), make_model()
    headed.add_matching_head()
    for name, model in (("plain", plain), ("headed", headed)):
        save(model, make_processor(), tmp_path / name)
    again = read(tmp_path / "headed")[0]
    assert torch.equal(again.matching_head.weight, headed.matching_head.weight)
    assert read(tmp_path / "plain")[0].matching_head is None
    for broken, config, words in (
        ("headed", "plain", "holds unknown weights, 2"),
        ("plain", "headed", "lacks weights, 2"),
    ):
        folder = tmp_path / f"broken {broken}"
        save(plain if broken == "plain" else headed, make_processor(), folder)
        (folder / "config.json").write_bytes((tmp_path / config / "config.json").read_bytes())
        with pytest.raises(UsageError, match=words):
            read(folder)


def test_matching_takes_a_measure_of_likeness(make_config, tmp_path):
    with pytest.raises(
        ValueError, match="matching_weight is 0.3 and contrastive_weight is 0, which learns what is alike"
    ):
        make_config(tmp_path, {"objective": "joint", "matching_weight": 0.3})
    with pytest.raises(ValueError, match="matching_weight belongs to objective joint, not clm"):
        make_config(tmp_path, {"objective": "clm", "matching_weight": 0.3})


def test_a_run_leaves_a_model_that_matches(run, base):
    stage = {"objective": "joint", "contrastive_weight": 0.1, "matching_weight": 0.5, "micro_batch": 2}
    left = run(stage, {"objective": "clm"})
    assert all({"matching_loss", "matching_accuracy"} <= line.keys() for line in left.steps[:2])
    assert all(0 < line["matching_loss"] and 0 <= line["matching_accuracy"] <= 1 for line in left.steps[:2])
    weights = left.weights()
    assert weights["matching_head.weight"].shape == (2, 32) and "matching_head.weight" not in read(base)[0].state_dict()
    assert {line["event"] for line in left.lines if "event" in line} >= {"started", "trained"}
