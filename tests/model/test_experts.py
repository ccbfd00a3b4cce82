"""Adapters with experts: the formula, the dense one where there is one expert, and everything else that an adapter does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlm
from vlm.adapters import FeedForward, SparseFeedForward
from vlm.api import user_turn
from vlm.configuration import AdapterConfig
from vlm.errors import UsageError
from vlm.generation.decoding import Decoding
from vlm.quantization import account, quantize
from vlm.routing import router_loss
from vlm.saving import read, save

EXPERTS = {"experts": 4, "experts_per_token": 2, "gate_init": 0.5}


def test_the_formula_in_float64():
    """Token by token: the k largest logits, their softmax, and as many feed-forwards."""
    torch.manual_seed(0)
    sparse = SparseFeedForward(12, 24, experts=5, per_token=2).double()
    hidden = torch.randn(2, 7, 12, dtype=torch.float64)
    found, logits = sparse(hidden)
    for number, token in enumerate(hidden.flatten(0, 1)):
        scores = sparse.router.weight @ token
        assert torch.allclose(logits[number], scores)
        best = scores.argsort(descending=True)[:2]
        odds = scores[best].exp() / scores[best].exp().sum()
        expected = sum(
            odds[place] * (layer.down_proj.weight @ F.gelu(layer.up_proj.weight @ token))
            for place, layer in enumerate(sparse.experts[int(index)] for index in best)
        )
        assert torch.allclose(found.flatten(0, 1)[number], expected, rtol=1e-6)


def test_one_expert_is_the_dense_feed_forward():
    torch.manual_seed(0)
    dense, sparse = FeedForward(12, 24), SparseFeedForward(12, 24, experts=1, per_token=1)
    sparse.experts[0].load_state_dict(dense.state_dict())
    hidden = torch.randn(2, 7, 12)
    assert torch.equal(sparse(hidden)[0], dense(hidden))


def test_every_expert_runs_though_no_token_chooses_it():
    """Ranks that disagree on what runs wait for each other under ZeRO-3."""
    torch.manual_seed(0)
    sparse, ran = SparseFeedForward(12, 24, experts=4, per_token=1), []
    nn.init.zeros_(sparse.router.weight)
    sparse.router.weight.data[2] = 1.0
    for number, expert in enumerate(sparse.experts):
        expert.register_forward_hook(lambda module, given, told, number=number: ran.append((number, len(given[0]))))
    mixed, _ = sparse(torch.rand(1, 6, 12))
    assert ran == [(0, 0), (1, 0), (2, 6), (3, 0)]
    mixed.sum().backward()
    sizes = [[float(weight.grad.norm()) for weight in expert.parameters()] for expert in sparse.experts]
    assert [min(pair) > 0 for pair in sizes] == [False, False, True, False] and max(sizes[0]) == 0.0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_router_logits_come_once_from_every_adapter(make_model, checkpointed):
    model = make_model(**EXPERTS).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, seen = torch.randint(10, 200, (2, 6)), []
    hooks = [
        adapter.feed_forward.router.register_forward_hook(lambda module, given, told: seen.append(told.detach()))
        for adapter in model.adapters.values()
    ]
    routed: list[torch.Tensor] = []
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32), "image_slots": torch.tensor([[0], [1]])}
    output = model.states(ids, token_image=torch.zeros_like(ids), adapter_router_logits=routed, **inputs)
    assert len(routed) == len(seen) == 3
    assert all(torch.equal(one, other) for one, other in zip(routed, seen, strict=True))
    balance, _ = router_loss(2, routed, torch.ones_like(ids, dtype=torch.bool))
    (output.last_hidden_state.sum() + balance).backward()
    assert len(routed) == 3 and len(seen) == (6 if checkpointed else 3)
    assert all(adapter.feed_forward.router.weight.grad.norm() > 0 for adapter in model.adapters.values())
    for hook in hooks:
        hook.remove()


def test_a_balance_without_tokens_is_nothing_and_reaches_the_router():
    logits = torch.randn(6, 4, requires_grad=True)
    loss, busiest = router_loss(2, [logits], torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and busiest == 0 and torch.count_nonzero(logits.grad) == 0


def test_saved_is_loaded(make_model, make_processor, tmp_path):
    model = make_model(**EXPERTS)
    save(model, make_processor(), tmp_path / "model")
    again = read(tmp_path / "model")[0]
    assert again.config.adapter_config.experts == 4
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_the_engine_says_what_generate_says(make_model, make_processor, make_picture, scheme):
    model = make_model(**EXPERTS | {"gate_init": 1.0})
    if scheme is not None:
        quantize(model, scheme)
        kept = {entry.name: entry.why for entry in account(model) if entry.scheme is None}
        assert all(kept[f"adapters.{layer}.feed_forward.router"] == "router" for layer in range(3))
        assert not any(".experts." in name for name in kept)
    talker = vlm.VLM(model, make_processor())
    turns = [user_turn([make_picture(seed)], text) for seed, text in enumerate(("What?", "How many of them?"))]
    engine = talker.engine(rows=2)
    requests = [engine.add(talker.prompt(turn), Decoding(max_new_tokens=8)) for turn in turns]
    while any(request.finish_reason is None for request in requests):
        engine.step()
    for turn, request in zip(turns, requests, strict=True):
        inputs = talker.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=0)
        wanted = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert request.tokens[: len(wanted)] == wanted[: len(request.tokens)] and len(request.tokens) >= len(wanted) - 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"experts": 2, "experts_per_token": 3},
            "adapter.experts_per_token is 3 and adapter.experts is 2; choose 1 to 2",
        ),
        ({"experts": 2, "feed_forward": 0.0}, "adapter.experts is 2 and adapter.feed_forward is 0; an expert is"),
    ],
)
def test_what_cannot_be(fields, words):
    with pytest.raises(UsageError, match=words):
        AdapterConfig(**fields)
