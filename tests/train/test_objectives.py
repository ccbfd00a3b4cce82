"""Objectives: each loss is the formula it stands for, however documents are packed and batches are cut."""

from __future__ import annotations

import ast
import inspect
import io

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm import linear_cross_entropy
from vlm.losses import IGNORED
from vlm.samples import Question, Sample
from vlm.train import objectives
from vlm.train.batches import READERS
from vlm.train.config_stage import Stage
from vlm.train.loop import checkpoint_activations
from vlm.train.objectives import OBJECTIVES, Plan

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def objective_of(make_model, make_processor):
    """An objective on a tiny model, and its reader."""

    def make(name: str, family: str = "qwen3", **stage):
        settings = Stage.model_validate({"objective": name, "steps": 1, **stage})
        objective = OBJECTIVES[name](make_model(family, gate_init=0.5), settings)
        if settings.matching_weight:
            objective.model.add_matching_head()
        return objective, READERS[name](make_processor(), settings, 256, objective.model.config.reading == "causal")

    return make


@pytest.fixture
def samples(make_picture) -> list[Sample]:
    """Two with a picture and several documents, one with two pictures, one with none."""
    pictures = [encoded(make_picture(seed)) for seed in range(4)]
    count, hue = Question("how many?", ("two",), "count"), Question("which hue?", ("red",), "colour")
    places = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]
    talk = ({"role": "user", "content": places}, {"role": "assistant", "content": "no"})
    return [
        Sample("a", (pictures[0],), "a picture", (count, hue)),
        Sample("b", (pictures[1],), "another one", (hue,)),
        Sample("c", (pictures[2], pictures[3]), messages=talk, text="words beside"),
        Sample("d", (), None, (count,), text="plain words"),
    ]


def encoded(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def batch_of(reader, samples: list[Sample]) -> dict:
    return reader.collate([reader.example(sample, np.random.default_rng(0)) for sample in samples])


def gradients(objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


# joint


@pytest.mark.parametrize("language", ["qwen3", "gpt2", "gemma3_text"])
def test_packed_documents_lose_what_each_loses_alone(objective_of, samples, language):
    """The judge is the model's plain path: one document, its own pictures, no document or position ids."""
    objective, reader = objective_of("joint", language, pack=False)
    batch = batch_of(reader, samples)
    loss, logs = objective(batch, Plan(1.0))
    total, right = torch.zeros(()), 0
    for row in range(len(samples)):
        pixels = batch["pixel_values"][[slot for slot in batch["image_slots"][row].tolist() if slot >= 0]]
        for document in range(1, int(batch["document_ids"][row].max()) + 1):
            chosen = batch["document_ids"][row] == document
            ids, labels = batch["input_ids"][row, chosen][None], batch["labels"][row, chosen][None]
            alone = objective.model(ids, pixel_values=pixels if len(pixels) else None, labels=labels)
            targets = (labels != IGNORED).sum()
            total = total + alone.loss * targets
            right += int((alone.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
    assert torch.allclose(loss, total, **CLOSE)
    assert int(logs["token_accuracy"]) == right
    packed, unpacked = gradients(objective, loss), gradients(objective, total)
    assert packed.keys() == unpacked.keys()
    assert all(torch.allclose(packed[name], unpacked[name], rtol=1e-4, atol=1e-5) for name in packed)


def test_the_pictures_matter(objective_of, samples):
    objective, reader = objective_of("joint")
    batch = batch_of(reader, samples[:1])
    other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
    assert not torch.allclose(objective(batch, Plan(1.0))[0], objective(other, Plan(1.0))[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["joint", "clm", "mlm"])
def test_micro_batches_of_unequal_targets_average_to_the_whole(objective_of, samples, name):
    objective, reader = objective_of(name, **({"mask_share": 0.5} if name == "mlm" else {}))
    listed = [samples[index] for index in (0, 1, 3)]
    whole, parts = batch_of(reader, listed), [batch_of(reader, [sample]) for sample in listed]
    counts = [objective.targets(part) for part in parts]
    assert objective.targets(whole) == sum(counts) and len(set(counts)) > 1
    once, logs = objective(whole, Plan(sum(counts)))
    pieces = [objective(part, Plan(sum(counts) / len(parts))) for part in parts]
    mean = torch.stack([loss for loss, _ in pieces]).mean()
    assert torch.allclose(once, mean, **CLOSE)
    assert torch.allclose(logs["token_accuracy"], torch.stack([log["token_accuracy"] for _, log in pieces]).mean())
    expected, found = gradients(objective, once), gradients(objective, mean)
    assert all(torch.allclose(expected[name], found[name], rtol=1e-4, atol=1e-6) for name in expected)


def test_questions_are_right_when_all_their_tokens_are(objective_of, samples):
    objective, reader = objective_of("joint", pack=False)
    batch = batch_of(reader, samples[:2])
    objective.eval()
    logits = objective.model(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        document_ids=batch["document_ids"],
        token_image=batch["token_image"],
        image_slots=batch["image_slots"],
        pixel_values=batch["pixel_values"],
    ).logits
    batch["labels"][batch["labels"] != IGNORED] = 0
    guessed = torch.roll(logits.argmax(-1), 1, dims=1)
    row, document = 0, 2
    chosen = (batch["document_ids"][row] == document) & (batch["labels"][row] != IGNORED)
    batch["labels"][row, chosen] = guessed[row, chosen]
    right = objective(batch, Plan(1.0))[1]["documents_right"]
    assert right.tolist() == [[False, True, False], [False, False, True]], (
        "a row without a third has nothing wrong in it"
    )


def contrastive_formula(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits = scale.double() * F.normalize(images.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).T
    by_image, by_text = logits.log_softmax(1).diagonal().mean(), logits.log_softmax(0).diagonal().mean()
    return -(by_image + by_text) / 2


def test_joint_adds_a_weighted_contrastive_term(objective_of, samples):
    plain, _ = objective_of("joint")
    objective, reader = objective_of("joint", contrastive_weight=0.25)
    batch = batch_of(reader, samples)
    loss, logs = objective(batch, Plan(7.0))
    images = objective.model.encode_image(batch["pixel_values"][:2])
    texts = objective.model.encode_text(batch["pair_input_ids"], batch["pair_attention_mask"])
    formula = contrastive_formula(images, texts, objective.model.logit_scale.exp()).float()
    assert torch.allclose(logs["contrastive_loss"], formula, **CLOSE)
    assert torch.allclose(logs["token_loss"], plain(batch, Plan(7.0))[0], **CLOSE)
    assert torch.allclose(loss, logs["token_loss"] + 0.25 * formula, **CLOSE)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_a_batch_without_pictures_has_the_gradients_of_one_with(objective_of, samples, loss):
    """Every rank runs the same modules in the same order, or ZeRO-3 waits for ever."""
    objective, reader = objective_of("joint", contrastive_weight=0.25, loss=loss)
    seen, blind = (objective(batch_of(reader, chosen), Plan(1.0)) for chosen in (samples[:2], samples[3:]))
    assert blind[1]["contrastive_loss"] == 0 and torch.isfinite(blind[0])
    with_pictures, without = gradients(objective, seen[0]), gradients(objective, blind[0])
    assert with_pictures.keys() == without.keys()
    sight = [name for name in without if name.startswith(("model.vision.", "model.adapters.", "model.image_pool."))]
    assert all(torch.count_nonzero(without[name]) == 0 for name in sight)
    assert all(torch.count_nonzero(with_pictures[name]) > 0 for name in sight if name.endswith("proj.weight"))


# contrastive


@pytest.mark.parametrize("language", ["qwen3", "bert"])
def test_infonce_is_the_formula_and_open_clips(objective_of, samples, language):
    objective, reader = objective_of("contrastive", language)
    batch = batch_of(reader, samples[:2] * 2)
    batch["pixel_values"][2:] = batch["pixel_values"][2:].flip(-1)
    assert objective.targets(batch) == 4
    loss, logs = objective(batch, Plan(4.0))
    images = objective.model.encode_image(batch["pixel_values"])
    texts = objective.model.encode_text(batch["input_ids"], batch["attention_mask"])
    scale = objective.model.logit_scale.exp()
    assert torch.allclose(loss.double(), contrastive_formula(images, texts, scale), rtol=1e-5)
    theirs = open_clip.loss.ClipLoss()(images, texts, scale)
    assert torch.allclose(loss, theirs, **CLOSE)
    ours, reference = gradients(objective, loss), gradients(objective, theirs)
    assert ours.keys() == reference.keys()
    assert all(torch.allclose(ours[name], reference[name], rtol=1e-4, atol=1e-6) for name in ours)
    top = (images @ texts.T).argmax(1) == torch.arange(4)
    assert float(logs["top1"]) == float(top.float().mean())


def test_siglip_is_the_formula_and_open_clips(objective_of, samples):
    objective, reader = objective_of("contrastive", loss="siglip")
    batch = batch_of(reader, samples[:2])
    loss, _ = objective(batch, Plan(2.0))
    images = objective.model.encode_image(batch["pixel_values"])
    texts = objective.model.encode_text(batch["input_ids"], batch["attention_mask"])
    scale, bias = objective.model.logit_scale.exp(), objective.model.logit_bias
    logits = scale.double() * images.double() @ texts.double().T + bias.double()
    signs = 2 * torch.eye(2, dtype=torch.float64) - 1
    assert torch.allclose(loss.double(), (1 + torch.exp(-signs * logits)).log().sum() / 2, rtol=1e-5)
    theirs = open_clip.loss.SigLipLoss()(images, texts, scale, bias)
    assert torch.allclose(loss, theirs, **CLOSE)
    ours, reference = gradients(objective, loss), gradients(objective, theirs)
    assert all(torch.allclose(ours[name], reference[name], rtol=1e-4, atol=1e-6) for name in ours)


def test_the_scale_is_held_below_a_hundred(objective_of, samples):
    objective, reader = objective_of("contrastive")
    batch = batch_of(reader, samples[:2])
    with torch.no_grad():
        objective.model.logit_scale.fill_(100.0).log_()
        at_most = objective(batch, Plan(1.0))[0]
        objective.model.logit_scale.fill_(50.0)
        assert torch.allclose(objective(batch, Plan(1.0))[0], at_most)


# text only


def test_clm_is_the_language_models_own_loss(objective_of, samples, causal_family):
    objective, reader = objective_of("clm", causal_family, pack=False)
    batch = batch_of(reader, samples)
    own = objective.model.language_model(
        batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    loss, logs = objective(batch, Plan(objective.targets(batch)))
    assert torch.allclose(logs.get("token_loss", loss), own.loss, **CLOSE), "a mixture of experts adds its router loss"


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("language", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_router_loss_is_transformers_own(objective_of, samples, language, checkpointed):
    objective, reader = objective_of("clm", language, pack=False)
    batch = batch_of(reader, samples)
    assert not batch["attention_mask"].bool().all(), "padding does not count"
    inputs = {"attention_mask": batch["attention_mask"], "labels": batch["labels"], "output_router_logits": True}
    own = objective.model.language_model(batch["input_ids"], **inputs)
    expected = gradients(objective, own.loss)
    if checkpointed:
        checkpoint_activations(objective.model.train())
    loss, logs = objective(batch, Plan(objective.targets(batch)))
    found = gradients(objective, loss)
    assert torch.allclose(loss, own.loss, **CLOSE) and torch.allclose(logs["router_loss"], own.aux_loss, **CLOSE)
    coefficient = objective.model.config.text_config.router_aux_loss_coef
    assert torch.allclose(logs["token_loss"], own.loss - coefficient * own.aux_loss, **CLOSE)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
    assert any(name.endswith("gate.weight") for name in found)


def test_joint_has_the_router_loss_of_all_its_documents(objective_of, samples):
    objective, reader = objective_of("joint", "mixtral", contrastive_weight=0.5)
    batch = batch_of(reader, samples)
    loss, logs = objective(batch, Plan(7.0))
    coefficient = objective.model.config.text_config.router_aux_loss_coef
    parts = logs["token_loss"] + coefficient * logs["router_loss"] + 0.5 * logs["contrastive_loss"]
    assert coefficient > 0 and torch.allclose(loss, parts)
    assert 2 / 4 <= float(logs["router_busiest"]) <= 1


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("language", ["qwen3", "mixtral"])
def test_joint_keeps_the_experts_of_adapters_even(make_model, objective_of, samples, language, checkpointed):
    """Over the tokens that see a picture, by the formula in float64; beside the router loss of the language model."""
    _, reader = objective_of("joint", language)
    model = make_model(language, gate_init=0.5, experts=4, experts_per_token=2, balance=0.25)
    objective = OBJECTIVES["joint"](model, reader.stage)
    heard: list[Tensor] = []
    for adapter in model.adapters.values():
        adapter.feed_forward.router.register_forward_hook(lambda module, given, told: heard.append(told.detach()))
    if checkpointed:
        checkpoint_activations(objective.model)
        objective.train()
    batch = batch_of(reader, samples)
    loss, logs = objective(batch, Plan(7.0))
    seeing = (batch["token_image"] >= 0).flatten()
    assert 0 < int(seeing.sum()) < seeing.numel() and len(heard) == 3
    logits = torch.cat([one.double()[seeing] for one in heard])
    shares = torch.zeros_like(logits).scatter_(1, logits.topk(2, dim=1).indices, 1.0).mean(dim=0)
    expected = 4 * (shares * logits.softmax(dim=1).mean(dim=0)).sum()
    assert torch.allclose(logs["adapter_router_loss"].double(), expected, rtol=1e-5)
    assert 0.5 <= logs["adapter_router_busiest"] <= 1
    parts = logs["token_loss"] + 0.25 * logs["adapter_router_loss"]
    if language == "mixtral":
        parts = parts + model.config.text_config.router_aux_loss_coef * logs["router_loss"]
    assert torch.allclose(loss, parts, **CLOSE)
    found = gradients(objective, loss)
    assert all(torch.count_nonzero(found[name]) for name in found if name.endswith("feed_forward.router.weight"))


def test_experts_without_a_picture_have_the_gradients_of_those_with(make_model, objective_of, samples):
    _, reader = objective_of("joint")
    objective = OBJECTIVES["joint"](make_model(gate_init=0.5, experts=4), reader.stage)
    seen, blind = (objective(batch_of(reader, chosen), Plan(1.0)) for chosen in (samples[:2], samples[3:]))
    assert blind[1]["adapter_router_loss"] == 0 < seen[1]["adapter_router_loss"]
    with_pictures, without = gradients(objective, seen[0]), gradients(objective, blind[0])
    assert with_pictures.keys() == without.keys()
    assert all(torch.count_nonzero(without[name]) == 0 for name in without if name.startswith("model.adapters."))


def test_a_router_without_a_loss_is_left_alone(objective_of, samples):
    objective, reader = objective_of("clm", "mixtral")
    objective.model.config.text_config.router_aux_loss_coef = 0.0
    assert "router_loss" not in objective(batch_of(reader, samples), Plan(1.0))[1]


@pytest.mark.parametrize("language", ["llama", "gpt2", "opt"])
def test_mlm_on_a_decoder_reads_both_ways_and_predicts_from_the_position_before(objective_of, samples, language):
    objective, reader = objective_of("mlm", language, mask_share=0.5)
    batch = batch_of(reader, samples[:1])
    length = int(batch["attention_mask"].sum())
    ids, labels = batch["input_ids"][:, :length], batch["labels"][:, :length]
    everything = torch.zeros(1, 1, length, length)
    positions = torch.arange(length)[None]
    logits = objective.model.language_model(ids, attention_mask=everything, position_ids=positions).logits
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED)
    assert torch.allclose(objective(batch, Plan(objective.targets(batch)))[0], expected, **CLOSE)


@pytest.mark.parametrize("language", ["bert", "roberta", "modernbert"])
def test_mlm_on_an_encoder_is_the_language_models_own_loss(objective_of, samples, language):
    objective, reader = objective_of("mlm", language, mask_share=0.5, pack=False)
    batch = batch_of(reader, samples)
    own = objective.model.language_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert torch.allclose(objective(batch, Plan(objective.targets(batch)))[0], own.loss, **CLOSE)


def test_nothing_to_predict_costs_nothing_and_keeps_the_gradient(objective_of, samples):
    objective, reader = objective_of("clm")
    batch = batch_of(reader, samples)
    batch["labels"].fill_(IGNORED)
    assert objective.targets(batch) == 0
    loss, _ = objective(batch, Plan(1.0))
    assert loss == 0 and all(torch.count_nonzero(gradient) == 0 for gradient in gradients(objective, loss).values())


# All of them


class Largest(TorchDispatchMode):
    """The most elements that a tensor made within had, of those with a dimension of `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.elements = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and self.size in tensor.shape:
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("name", ["joint", "clm", "mlm"])
def test_logits_of_all_tokens_never_exist(objective_of, samples, monkeypatch, name):
    objective, reader = objective_of(name, **({"mask_share": 0.9} if name == "mlm" else {}))
    batch = batch_of(reader, samples * 3)
    vocabulary, width = objective.model.language_model.get_input_embeddings().weight.shape
    plain = objective(batch, Plan(1.0))[0]
    monkeypatch.setattr(linear_cross_entropy, "MOST_LOGITS", 8 * vocabulary)
    with Largest(vocabulary) as seen:
        loss, _ = objective(batch, Plan(1.0))
        loss.backward()
    assert torch.allclose(loss, plain)
    assert seen.elements == width * vocabulary < objective.targets(batch) * vocabulary, (
        "the gradient of the head's weight"
    )


@pytest.mark.parametrize(
    ("name", "language", "stage"),
    [
        ("contrastive", "qwen3", {}),
        ("contrastive", "bert", {"loss": "siglip"}),
        ("contrastive", "gpt2", {}),
        ("joint", "qwen2", {}),
        ("joint", "opt", {"contrastive_weight": 1.0}),
        ("joint", "qwen3", {"contrastive_weight": 1.0, "loss": "siglip"}),
        ("joint", "gpt2", {"contrastive_weight": 1.0, "matching_weight": 1.0}),
        ("clm", "qwen3", {}),
        ("mlm", "gpt2", {}),
        ("mlm", "bert", {}),
    ],
)
def test_an_objective_reads_what_it_says(objective_of, samples, name, language, stage):
    objective, reader = objective_of(name, language, **stage)
    loss, _ = objective(batch_of(reader, samples[:2]), Plan(1.0))
    found = {key.removeprefix("model.") for key in gradients(objective, loss)}
    said = {key for key, _ in objective.model.named_parameters() if key.startswith(objective.reads())}
    assert found == said


def test_every_objective_is_short():
    classes = [node for node in ast.parse(inspect.getsource(objectives)).body if isinstance(node, ast.ClassDef)]
    assert {kind.__name__ for kind in OBJECTIVES.values()} <= {node.name for node in classes}
    assert {
        node.name: node.end_lineno - node.lineno + 1 for node in classes if node.end_lineno - node.lineno >= 60
    } == {}
