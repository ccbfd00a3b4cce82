"""A contrastive batch that is cut into micro-batches has the loss and the gradient of the whole one, dropout included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.losses import IGNORED
from vlm.train.config_stage import Stage
from vlm.train.objectives import OBJECTIVES, Plan
from vlm.train.ranks import join
from vlm.train.step import prepare

PARTS, SIZE = 4, 3
DROPS = {
    "name": "timm:vit_tiny_patch16_224",
    "image_size": (32, 32),
    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.2},
}
# GPT-2 comes with dropout of its own, of embeddings, attention and residuals.
LANGUAGE = "gpt2"


class Engine:
    """What `prepare` knows of DeepSpeed's engine."""

    def __init__(self, objective) -> None:
        self.module, self.device = objective, torch.device("cpu")

    def __call__(self, batch, plan):
        return self.module(batch, plan)


@pytest.fixture
def objective_of(make_model):
    """An objective in training mode, with dropout in both towers; `still`: without."""
    join()

    def make(name: str, still: bool = False, **stage):
        model = make_model(LANGUAGE, vision=DROPS, gate_init=0.5)
        model.logit_scale.data.fill_(2.0)
        model.logit_bias.data.fill_(-1.0)
        return OBJECTIVES[name](model, Stage.model_validate({"objective": name, "steps": 1, **stage})).train(not still)

    return make


def texts_of(seed: int, rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 280, (rows, 8), generator=draw)
    mask = (torch.arange(8) < torch.randint(3, 9, (rows, 1), generator=draw)).long()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(rows, 3, 32, 32, generator=draw)}


def contrastive_batches() -> list[dict]:
    return [texts_of(seed, SIZE) for seed in range(PARTS)]


def joint_batches() -> list[dict]:
    """Rows with a picture each, of which an unequal number has a text that goes with it; the third micro-batch has none."""
    batches = []
    for seed, pairs in enumerate((3, 1, 0, 2)):
        texts = texts_of(seed, SIZE)
        batches.append(
            {
                "input_ids": texts["input_ids"],
                "labels": texts["input_ids"],
                "position_ids": torch.arange(8).expand(SIZE, 8),
                "document_ids": texts["attention_mask"],
                "token_image": torch.zeros(SIZE, 8, dtype=torch.long),
                "pixel_values": texts["pixel_values"],
                "image_slots": torch.arange(SIZE)[:, None],
                "pair_input_ids": texts["input_ids"][: max(1, pairs)],
                "pair_attention_mask": texts["attention_mask"][: max(1, pairs)],
                "pair_images": torch.arange(pairs),
            }
        )
    return batches


def gradients(objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in objective.named_parameters() if value.grad is not None}


def cut(objective, batches: list[dict]) -> tuple[Tensor, dict[str, Tensor], list[dict]]:
    """The mean loss over micro-batches, as the loop and the engine take it, its gradient, and the logs."""
    torch.manual_seed(7)
    plans = prepare(Engine(objective), batches)
    told = [objective(batch, plan) for batch, plan in zip(batches, plans, strict=True)]
    loss = torch.stack([loss for loss, _ in told]).mean()
    return loss.detach(), gradients(objective, loss), [logs for _, logs in told]


def formula(kind: str, images: Tensor, texts: Tensor, model) -> Tensor:
    """The mean over N pairs, in float64."""
    images, texts = F.normalize(images.double(), dim=-1), F.normalize(texts.double(), dim=-1)
    logits = model.logit_scale.double().exp() * images @ texts.T
    if kind == "infonce":
        return -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    signs = 2 * torch.eye(len(images), dtype=torch.float64) - 1
    return (1 + torch.exp(-signs * (logits + model.logit_bias.double()))).log().sum() / len(images)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the whole gradient, relative."""
    assert found.keys() == expected.keys()
    return float(flat([found[name] - expected[name] for name in found]).norm() / flat(list(expected.values())).norm())


def flat(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten().double() for value in values])


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_the_gradient_is_that_of_all_micro_batches_in_one_graph(objective_of, kind):
    """The reference embeds with the same random numbers and keeps every graph."""
    objective, batches = objective_of("contrastive", loss=kind), contrastive_batches()
    loss, found, _ = cut(objective, batches)
    torch.manual_seed(7)
    pairs = [objective(batch, None) for batch in batches]
    images, texts = (torch.cat([one[place] for one in pairs]) for place in (0, 1))
    whole = formula(kind, images, texts, objective.model)
    assert torch.allclose(loss.double(), whole, rtol=1e-6)
    assert error(found, gradients(objective, whole)) < 1e-5
    again = torch.cat([objective(batch, None).images for batch in batches])
    assert not torch.allclose(images, again, rtol=1e-2), "there is no dropout to replay"


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_micro_batches_are_the_batch_in_one_piece(objective_of, kind):
    objective, batches = objective_of("contrastive", still=True, loss=kind), contrastive_batches()
    loss, found, logs = cut(objective, batches)
    batch = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
    whole, whole_logs = objective(batch, Plan(float(len(batch["input_ids"]))))
    assert torch.allclose(loss, whole, rtol=1e-6)
    assert torch.allclose(torch.stack([each["top1"] for each in logs]).mean(), whole_logs["top1"])
    assert error(found, gradients(objective, whole)) < 1e-5


def test_a_cut_batch_holds_the_activations_of_one_tower_at_a_time(objective_of):
    """The text tower runs anew once the pictures' gradients have gone through all of theirs."""
    objective, (batch, *others) = objective_of("contrastive"), contrastive_batches()
    plan = prepare(Engine(objective), [batch, *others])[0]
    order: list[str] = []
    model = objective.model
    model.language_model.base_model.register_forward_hook(lambda *_: order.append("text"))
    model.vision.register_forward_hook(lambda *_: order.append("pictures"))
    first = model.vision.trunk.patch_embed.proj.weight
    first.register_post_accumulate_grad_hook(lambda _: order.append("pictures done"))
    objective(batch, plan)[0].backward()
    assert order == ["text", "pictures", "pictures done", "text"]


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_joint_compares_the_pairs_of_all_micro_batches(objective_of, kind, still):
    """With dropout, nothing is to be said: the reference embeds once for pairs and tokens both, and here it cannot."""
    objective, batches = objective_of("joint", still, loss=kind, contrastive_weight=0.5), joint_batches()
    for batch in [] if still else batches:
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss, found, logs = cut(objective, batches)
    torch.manual_seed(7)
    pairs = [objective(batch, None) for batch in batches]
    images, texts = (torch.cat([one[place] for one in pairs]) for place in (0, 1))
    contrastive = formula(kind, images, texts, objective.model)
    objective.stage = objective.stage.model_copy(update={"contrastive_weight": 0.0})
    mean_targets = max(1.0, sum(objective.targets(batch) for batch in batches)) / PARTS
    whole = torch.stack([objective(batch, Plan(mean_targets))[0] for batch in batches]).mean() + 0.5 * contrastive
    assert torch.allclose(loss.double(), whole, rtol=1e-6)
    assert torch.allclose(torch.stack([each["contrastive_loss"] for each in logs]).mean().double(), contrastive)
    assert error(found, gradients(objective, whole)) < 1e-5


def test_what_is_drawn_after_a_replay_is_not_drawn_twice(objective_of):
    """A micro-batch leaves the generator where it stood."""
    objective, batches = objective_of("contrastive"), contrastive_batches()
    plans = prepare(Engine(objective), batches)
    before = torch.get_rng_state()
    objective(batches[0], plans[0])
    assert torch.equal(torch.get_rng_state(), before)
