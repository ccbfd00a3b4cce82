"""Where a model looked: maps against the formula in float64, what they must sum to, and a model that stays as it was."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch

import vlm
from vlm.adapters import CrossAttention
from vlm.api import user_turn
from vlm.errors import UsageError
from vlm.looking import attention_maps, looks, words_of

IMAGE = 3  # the token of a picture in `make_model`'s models
TWO = [10, 11, IMAGE, 12, 13, IMAGE, 14, 15]
SEEN = [-1, -1, 0, 0, 0, 1, 1, 1]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def pixels_of(pictures: int) -> torch.Tensor:
    """Random pictures for `make_model`'s models."""
    return torch.randn(pictures, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_gates(model: vlm.VLMModel, *gates: float) -> vlm.VLMModel:
    """The model with these gates of its adapters' attention."""
    with torch.no_grad():
        for adapter, gate in zip(model.adapters.values(), gates, strict=True):
            adapter.attention_gate.fill_(gate)
    return model


def entered(model: vlm.VLMModel, ids: list[int], pixels: torch.Tensor) -> dict[torch.nn.Module, np.ndarray]:
    """What the norm before each cross-attention gives, in one pass."""
    found: dict[torch.nn.Module, np.ndarray] = {}

    def keep(attention: torch.nn.Module, norm: torch.nn.Module, given: tuple, hidden: torch.Tensor) -> None:
        found[attention] = hidden[0].numpy()

    parts = [*model.adapters.values()]
    hooks = [part.attention_norm.register_forward_hook(partial(keep, part.attention)) for part in parts]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return found


def weights_64(attention: CrossAttention, hidden: np.ndarray, source: np.ndarray) -> np.ndarray:
    """softmax(Q Kᵀ / √d), the mean of the heads, head by head: (L, C), (S, D) -> (L, S)."""
    d, groups = attention.head_dim, attention.heads // attention.kv_heads
    told = {name: weight.detach().numpy() for name, weight in attention.named_parameters()}

    def normed(vectors: np.ndarray, name: str) -> np.ndarray:
        if f"{name}_norm.weight" not in told:
            return vectors
        size = np.sqrt((vectors**2).mean(-1, keepdims=True) + (attention.q_norm.eps or 0.0))
        return vectors / size * told[f"{name}_norm.weight"]

    heads = []
    for head in range(attention.heads):
        own, shared = slice(head * d, head * d + d), slice(head // groups * d, head // groups * d + d)
        queries = normed(hidden @ told["q_proj.weight"][own].T, "q")
        keys = normed(source @ told["k_proj.weight"][shared].T, "k")
        heads.append(softmax(queries @ keys.T / np.sqrt(d)))
    return np.mean(heads, axis=0)


@pytest.mark.parametrize("adapter", [{}, {"kv_heads": 2, "qk_norm": True}, {"every": 2}])
def test_a_map_is_the_formula(make_model, adapter):
    exact = make_model(**adapter).double()
    for name, weight in exact.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(weight, 0.5, 3.0)
    gates = [0.3, -2.0, 0.7][: len(exact.adapters)]
    with_gates(exact, *gates)
    with torch.no_grad():
        states = exact.image_states(pixels_of(2).double()).numpy()  # (2, S, D)
    hidden = entered(exact, TWO, pixels_of(2).double())
    shares = np.abs(np.tanh(gates))
    wanted = np.zeros((len(TWO), 16))
    for place, picture in enumerate(SEEN):
        if picture < 0:
            continue
        for share, part in zip(shares, exact.adapters.values(), strict=True):
            seen = weights_64(part.attention, hidden[part.attention][place : place + 1], states[picture])
            wanted[place] += share / shares.sum() * seen[0]
    pictures, maps = attention_maps(exact.float(), TWO, pixels_of(2))
    assert pictures == SEEN
    assert maps.shape == (len(TWO), 4, 4) and maps.dtype == torch.float32
    np.testing.assert_allclose(maps.flatten(1).numpy(), wanted, atol=2e-6)


def test_a_resampler_is_seen_through_by_rollout(make_model):
    model = make_model(gate_init=1.0, latents=5, resampler_depth=2)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        tokens = exact.vision(pixels_of(1).double())
        tokens = tokens + vlm.vision.grid_positions(exact.vision.grid, exact.vision.width).double()
        latents, held = exact.resampler.latents[None], np.zeros((5, 16))
        for layer in exact.resampler.layers:
            queries = layer.latent_norm(latents)
            source = torch.cat([layer.source_norm(tokens), queries], dim=1)
            looked = weights_64(layer.attention, queries[0].numpy(), source[0].numpy())
            held = 0.5 * held + 0.5 * (looked[:, :16] + looked[:, 16:] @ held)
            latents = layer(latents, tokens)
        states = exact.resampler.norm(latents)[0].numpy()
    held /= held.sum(axis=1, keepdims=True)
    ids = [IMAGE, 12, 13]
    hidden = entered(exact, ids, pixels_of(1).double())
    through = [weights_64(part.attention, hidden[part.attention], states) @ held for part in exact.adapters.values()]
    _, maps = attention_maps(model, ids, pixels_of(1))
    np.testing.assert_allclose(maps.flatten(1).numpy(), np.mean(through, axis=0), atol=2e-6)


def test_a_map_sums_to_1_where_a_picture_is_seen(make_model, causal_family):
    pictures, maps = attention_maps(make_model(causal_family, gate_init=1.0), TWO, pixels_of(2))
    assert pictures == SEEN
    seen = torch.tensor(SEEN) >= 0
    torch.testing.assert_close(maps.sum(dim=(1, 2)), seen.float())
    assert (maps >= 0).all()


def test_only_the_seen_picture_is_looked_at(make_model):
    """With adapters in the first layer alone no token knows of any other picture, so its map is that of the picture alone."""
    model = make_model(gate_init=1.0, layers=[0])
    _, both = attention_maps(model, TWO, pixels_of(2))
    _, first = attention_maps(model, TWO[:5], pixels_of(2)[:1])
    torch.testing.assert_close(both[:5], first)
    other = torch.cat([torch.zeros(1, 3, 32, 32), pixels_of(2)[1:]])
    _, blank = attention_maps(model, TWO, other)
    assert torch.equal(blank[5:], both[5:]) and not torch.allclose(blank[2:5], both[2:5])


def test_a_shut_gate_does_not_count(make_model, make_processor, make_picture):
    model = make_model()
    with_gates(model, 0.0, 0.0, 0.5)
    _, last_alone = attention_maps(model, TWO, pixels_of(2))
    with_gates(model, 0.0, 0.0, -3.0)
    torch.testing.assert_close(attention_maps(model, TWO, pixels_of(2))[1][2:4], last_alone[2:4])
    with_gates(model, 0.0, 0.0, 0.0)
    assert not attention_maps(model, TWO, pixels_of(2))[1].any()
    talker = vlm.VLM(model, make_processor())
    found = looks(talker, user_turn([make_picture()], "Hm?"), "a b")
    assert [(look.text, look.picture, look.weights) for look in found] == [("a", None, None), (" b", None, None)]


def test_the_model_stays_as_it_was(make_model):
    model = make_model(gate_init=1.0)
    inputs = {"input_ids": torch.tensor([TWO]), "pixel_values": pixels_of(2)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    _, maps = attention_maps(model, TWO, pixels_of(2))
    with pytest.raises(UsageError, match="give one picture for each place"):
        attention_maps(model, TWO, pixels_of(1))
    assert not maps.requires_grad and all(weight.grad is None for weight in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(part._forward_hooks for part in model.modules() if isinstance(part, CrossAttention))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def test_eager_and_sdpa_look_at_the_same(make_model):
    model = make_model(gate_init=1.0)
    _, fused = attention_maps(model, TWO, pixels_of(2))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(attention_maps(model, TWO, pixels_of(2))[1], fused)


def test_a_word_is_the_mean_of_where_its_tokens_were_chosen(make_model, make_processor, make_picture):
    talker = vlm.VLM(make_model(gate_init=1.0), make_processor())
    messages = user_turn([make_picture(0), make_picture(1)], "Hm?")
    prompt = talker.prompt(messages)
    found = looks(talker, messages, "ab c")  # a token a byte
    assert [look.text for look in found] == ["ab", " c"]
    ids = prompt.ids + talker.processor.tokenizer.encode("ab c")
    _, maps = attention_maps(talker.model, ids, prompt.pixels)
    start = len(prompt.ids) - 1
    torch.testing.assert_close(found[0].weights, (maps[start] + maps[start + 1]) / 2)
    torch.testing.assert_close(found[1].weights, maps[start + 3])
    assert [look.picture for look in found] == [1, 1], "an answer looks at the last picture before it"
    assert [look.picture for look in looks(talker, user_turn([], "Hm?"), "ab c")] == [None, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red circle.", ["A", " red", " circle."]),
        ("  spaced\n\nout \n", ["  spaced", "\n\nout \n"]),
        ("naïve 🙂 café", ["naïve", " 🙂", " café"]),
        ("红色的 circle", ["红", "色", "的", " circle"]),
        ("", []),
    ],
)
def test_words_hold_the_whole_text_and_every_byte_of_theirs(make_tokenizer, text, words):
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode(text)
    found = words_of(tokenizer, tokens)
    assert [word for word, _ in found] == words
    for word, places in found:
        assert bytes(tokenizer.decode([tokens[at] for at in places]), "utf-8") == bytes(word.strip(), "utf-8")


def test_what_can_not_be_looked_up_is_refused(make_model, make_processor, make_picture):
    messages = user_turn([make_picture()], "Hm?")
    with pytest.raises(UsageError, match="family 'bert' reads both ways and gives no replies"):
        looks(vlm.VLM(make_model("bert"), make_processor()), messages, "a")
    with pytest.raises(UsageError, match=r"have 3\d\d tokens and the language model takes 256; shorten one"):
        looks(vlm.VLM(make_model(), make_processor()), messages, "a" * 300)
