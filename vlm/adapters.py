"""The parts that let a language model look: gated cross-attention, a perceiver resampler, an attention pool.

Knows tensors of hidden states and image tokens. Knows nothing of tokens' meaning, of which language model it serves, or of
how pictures became tokens. Modules take ready parts and numbers; `build_adapter` makes them of a configuration.

Shapes: B rows, L text tokens, S image tokens, H heads, K key/value heads, d features a head, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.configuration import AdapterConfig
from vlm.errors import UsageError


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each head, (…, d) -> (…, d), in the precision of what comes in: autocast leaves the weight in float32, for
    which PyTorch has no fused kernel."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, d) -> (…, d)."""
        return F.rms_norm(hidden, self.normalized_shape, self.weight.to(hidden.dtype), self.eps)


class CrossAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V with queries from one sequence and keys and values from another (Vaswani et al. 2017, eq. 1).

    Keys and values are made apart from the queries, so that they can be made once for many queries.
    fused: PyTorch's fused kernel; without it, two plain matrix products. Measured with bf16 on CPUs, forward and backward of
    short sequences, the plain products take a third to a fifth of the fused kernel's time.
    Under tensor parallelism the projections make a share of the heads, with as many queries to a key as all of them have.
    """

    def __init__(
        self, query_width: int, source_width: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.fused = True
        self.q_proj = nn.Linear(query_width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(source_width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(source_width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, query_width, bias=False)
        self.q_norm = HeadNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_dim) if qk_norm else nn.Identity()

    def keys_values(self, source: Tensor) -> Tensor:
        """(B, S, source width) -> (B, 2, K, S, d): keys, then values."""
        keys = self.k_norm(self.k_proj(source).unflatten(-1, (-1, self.head_dim)))
        values = self.v_proj(source).unflatten(-1, (-1, self.head_dim))
        return torch.stack([keys, values], dim=1).transpose(2, 3)

    def forward(self, hidden: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, C) and (B, 2, K, S, d) -> (B, L, C). mask (B, 1, L, S): True where a query may look; no row all False."""
        queries = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        # Not the hidden states' type, which under autocast is float32 where the products are bf16.
        keys, values = keys_values.to(queries.dtype).unbind(1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
            )
        else:
            groups = self.heads // self.kv_heads
            mixed = plain_attention(
                queries, keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1), mask
            )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def plain_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, L, d), (B, H, S, d), (B, H, S, d) -> (B, H, L, d). mask: bool, True where a query may look."""
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ values


class FeedForward(nn.Module):
    """W₂ GELU(W₁ x), (…, C) -> (…, C)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        return self.down_proj(F.gelu(self.up_proj(hidden)))


class SparseFeedForward(nn.Module):
    """Σ_e g_e · FeedForward_e(x) over the k experts with the largest router logits of a token; g is their softmax.

    Shazeer et al. 2017 ("Outrageously Large Neural Networks", equations 2, 3 and 5, without noise). No token is dropped: an
    expert takes as many as choose it. Every expert runs at every call, if on no token at all: under ZeRO-3 the ranks gather its
    weights together.
    """

    def __init__(self, width: int, inner: int, experts: int, per_token: int) -> None:
        super().__init__()
        self.per_token = per_token
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, inner) for _ in range(experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> (B, L, C), and the router's logits (B·L, experts)."""
        flat = hidden.flatten(0, -2)
        logits = self.router(flat)
        largest, chosen = logits.topk(self.per_token, dim=-1)  # (B·L, k)
        weights = largest.float().softmax(dim=-1).to(hidden.dtype)
        mixed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            told = expert(flat[tokens]) * weights[tokens, places, None]
            mixed = mixed.index_add(0, tokens, told.to(mixed.dtype))
        return mixed.view_as(hidden), logits


class GatedCrossAttention(GradientCheckpointingLayer):
    """One adapter: x + tanh(α_attn) · CrossAttention(norm(x), image), then x + tanh(α_ff) · FeedForward(norm(x)).

    Flamingo (Alayrac et al. 2022), section 3.1.2. A text token that sees no picture passes unchanged, bit for bit.
    """

    def __init__(
        self,
        hidden_size: int,
        attention: CrossAttention,
        feed_forward: FeedForward | SparseFeedForward | None,
        gate_init: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = attention
        self.attention_gate = nn.Parameter(torch.full((1,), float(gate_init)))
        self.feed_forward = feed_forward
        if feed_forward is not None:
            self.feed_forward_norm = nn.LayerNorm(hidden_size)
            self.feed_forward_gate = nn.Parameter(torch.full((1,), float(gate_init)))

    def forward(
        self, hidden: Tensor, keys_values: Tensor, sees: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden (B, L, C); keys_values (B, 2, K, S, d); sees (B, L) True where a token sees a picture; mask (B, 1, L, S).

        Returns hidden (B, L, C), and router logits (B·L, experts); None where the feed-forward has no router.
        """
        router_logits: Tensor | None = None
        attended = self.attention(self.attention_norm(hidden), keys_values, mask)
        looked = hidden + self.attention_gate.tanh() * attended
        if self.feed_forward is not None:
            told = self.feed_forward(self.feed_forward_norm(looked))
            if isinstance(told, tuple):
                told, router_logits = told
            looked = looked + self.feed_forward_gate.tanh() * told
        return torch.where(sees[..., None], looked, hidden), router_logits


def build_adapter(config: AdapterConfig, hidden_size: int, text_heads: int, image_width: int) -> GatedCrossAttention:
    """One adapter from numbers: those of the configuration, the language model's where it leaves them open."""
    heads = config.heads or text_heads
    kv_heads = config.kv_heads or heads
    head_dim = config.head_dim or hidden_size // heads
    if not head_dim:
        raise UsageError(
            f"adapter.heads {heads} of hidden size {hidden_size} leave no feature to a head; take fewer, or set adapter.head_dim"
        )
    if heads % kv_heads:
        raise UsageError(f"adapter.heads {heads} is no multiple of adapter.kv_heads {kv_heads}; choose a divisor")
    attention = CrossAttention(hidden_size, image_width, heads, kv_heads, head_dim, config.qk_norm)
    inner = int(config.feed_forward * hidden_size)
    feed_forward: FeedForward | SparseFeedForward | None = FeedForward(hidden_size, inner) if inner else None
    if config.experts:
        feed_forward = SparseFeedForward(hidden_size, inner, config.experts, config.experts_per_token)
    return GatedCrossAttention(hidden_size, attention, feed_forward, config.gate_init)


class ResamplerLayer(nn.Module):
    """Latents attend to image tokens and to themselves, then pass a feed-forward, each with a residual."""

    def __init__(self, width: int, attention: CrossAttention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.source_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """(n, latents, D) and (n, S, D) -> (n, latents, D)."""
        queries = self.latent_norm(latents)
        source = torch.cat([self.source_norm(tokens), queries], dim=1)
        latents = latents + self.attention(queries, self.attention.keys_values(source))
        return latents + self.feed_forward(self.feed_forward_norm(latents))


class PerceiverResampler(nn.Module):
    """Turns S image tokens into a fixed number of latents (Flamingo, section 3.1.1): (n, S, D) -> (n, latents, D)."""

    def __init__(self, width: int, latents: int, depth: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width) * 0.02)
        self.layers = nn.ModuleList(
            ResamplerLayer(
                width,
                CrossAttention(width, width, heads, heads, width // heads, qk_norm=False),
                FeedForward(width, feed_forward),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, S, D) -> (n, latents, D)."""
        latents = self.latents.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, tokens)
        return self.norm(latents)


class AttentionPool(nn.Module):
    """One learned query gathers image tokens into the shared contrastive space: (n, S, D) -> (n, E)."""

    def __init__(self, width: int, embedding_dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width) * 0.02)
        self.attention = CrossAttention(width, width, heads, heads, width // heads, qk_norm=False)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embedding_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, S, D) -> (n, E)."""
        query = self.query.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        gathered = self.attention(query, self.attention.keys_values(tokens))
        return self.projection(self.norm(gathered.squeeze(1)))
