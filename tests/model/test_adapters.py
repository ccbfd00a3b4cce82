"""Adapters, resampler and pool against their formulas, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vlm.adapters import (
    AttentionPool,
    CrossAttention,
    FeedForward,
    GatedCrossAttention,
    PerceiverResampler,
    build_adapter,
)
from vlm.configuration import AdapterConfig
from vlm.errors import UsageError


def formula(attention: CrossAttention, text: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q Kᵀ / √d) V, head by head, in plain loops."""

    def head(tensor: Tensor, index: int) -> Tensor:
        return tensor[..., index * attention.head_dim : (index + 1) * attention.head_dim]

    def normed(tensor: Tensor, norm: nn.Module) -> Tensor:
        if isinstance(norm, nn.Identity):
            return tensor
        return tensor / (tensor.pow(2).mean(-1, keepdim=True) + torch.finfo(tensor.dtype).eps).sqrt() * norm.weight

    queries, keys, values = (
        tensor @ layer.weight.T
        for tensor, layer in ((text, attention.q_proj), (source, attention.k_proj), (source, attention.v_proj))
    )
    group = attention.heads // attention.kv_heads
    mixed = []
    for index in range(attention.heads):
        query = normed(head(queries, index), attention.q_norm)
        key = normed(head(keys, index // group), attention.k_norm)
        scores = query @ key.transpose(-1, -2) / math.sqrt(attention.head_dim)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed.append(weights @ head(values, index // group))
    return torch.cat(mixed, dim=-1) @ attention.o_proj.weight.T


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "qk_norm"), [(4, 4, False), (4, 2, False), (6, 1, True), (4, 4, True)])
def test_cross_attention_is_the_formula(heads, kv_heads, qk_norm, masked, fused):
    torch.manual_seed(0)
    attention = CrossAttention(20, 12, heads, kv_heads, head_dim=8, qk_norm=qk_norm).double()
    attention.fused = fused
    if qk_norm:
        nn.init.uniform_(attention.q_norm.weight, 0.5, 2)
        nn.init.uniform_(attention.k_norm.weight, 0.5, 2)
    text, source = torch.randn(2, 5, 20).double(), torch.randn(2, 7, 12).double()
    mask = torch.rand(2, 1, 5, 7) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True
    expected = formula(attention, text, source, mask)
    torch.testing.assert_close(attention(text, attention.keys_values(source), mask), expected, atol=1e-12, rtol=1e-10)


def test_an_adapter_adds_two_gated_branches():
    torch.manual_seed(0)
    attention = CrossAttention(20, 12, 4, 2, 8, qk_norm=False)
    adapter = GatedCrossAttention(20, attention, FeedForward(20, 40), gate_init=0.5).double()
    nn.init.constant_(adapter.feed_forward_gate, -0.3)
    text, source = torch.randn(2, 5, 20).double(), torch.randn(2, 7, 12).double()
    sees = torch.tensor([[False, False, True, True, True], [False] * 5])

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()

    attended = formula(attention, norm(text, adapter.attention_norm), source, None)
    expected = text + math.tanh(0.5) * attended
    inner = norm(expected, adapter.feed_forward_norm) @ adapter.feed_forward.up_proj.weight.T
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    expected = expected + math.tanh(-0.3) * (inner @ adapter.feed_forward.down_proj.weight.T)
    result, _ = adapter(text, attention.keys_values(source), sees, None)
    torch.testing.assert_close(result[sees], expected[sees], atol=1e-12, rtol=1e-10)
    assert torch.equal(result[~sees], text[~sees])


def test_a_resampler_brings_any_number_of_tokens_to_its_latents():
    torch.manual_seed(0)
    resampler = PerceiverResampler(16, latents=5, depth=2, heads=2, feed_forward=32).double()
    tokens = torch.randn(3, 11, 16).double()
    result = resampler(tokens)
    assert result.shape == (3, 5, 16)
    # A set in, whatever its order; every picture apart from the others.
    torch.testing.assert_close(resampler(tokens[:, torch.randperm(11)]), result)
    torch.testing.assert_close(resampler(tokens[1:2]), result[1:2])
    layer = resampler.layers[0]
    latents = resampler.latents.expand(3, -1, -1)
    queries = layer.latent_norm(latents)
    source = torch.cat([layer.source_norm(tokens), queries], dim=1)
    after = latents + formula(layer.attention, queries, source, None)
    after = after + layer.feed_forward(layer.feed_forward_norm(after))
    resampler.layers = resampler.layers[:1]
    torch.testing.assert_close(resampler(tokens), resampler.norm(after), atol=1e-12, rtol=1e-10)


def test_a_pool_gathers_tokens_by_its_query():
    torch.manual_seed(0)
    pool = AttentionPool(16, embedding_dim=6, heads=2).double()
    tokens = torch.randn(3, 11, 16).double()
    gathered = formula(pool.attention, pool.query.expand(3, 1, -1), tokens, None).squeeze(1)
    torch.testing.assert_close(pool(tokens), pool.norm(gathered) @ pool.projection.weight.T, atol=1e-12, rtol=1e-10)


def test_gates_are_reported_as_tanh(make_model):
    gates = make_model(gate_init=0.5, layers=(0, 2)).gates()
    assert list(gates) == ["0", "2"]
    for pair in gates.values():
        assert pair == pytest.approx((math.tanh(0.5), math.tanh(0.5)))
    assert make_model(gate_init=0.5, feed_forward=0).gates()["1"] == pytest.approx((math.tanh(0.5), 0.0))


def test_adapter_configuration_says_what_is_wrong():
    assert AdapterConfig(every=4).chosen_layers(9) == (3, 7)
    assert AdapterConfig(layers=[0, 5]).chosen_layers(6) == (0, 5)
    for wrong, message in (
        (lambda: AdapterConfig(positions="rotary"), "'rotary'"),
        (lambda: AdapterConfig(every=0), "at least 1"),
        (lambda: AdapterConfig(every=7).chosen_layers(6), "6 layers"),
        (lambda: AdapterConfig(layers=(6,)).chosen_layers(6), "0 to 5"),
        (lambda: AdapterConfig.from_dict({"gate": 1}), "'gate'"),
        (lambda: build_adapter(AdapterConfig(heads=4, kv_heads=3), 32, 4, 16), "3"),
        (lambda: build_adapter(AdapterConfig(heads=64), 32, 4, 16), "heads 64 of hidden size 32 .* adapter.head_dim"),
    ):
        with pytest.raises(UsageError, match=message) as refusal:
            wrong()
        assert "\n" not in str(refusal.value)
