"""Token loss from hidden states: in chunks, with the head's own arithmetic, it is that of full logits in every family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vlm.linear_cross_entropy as module
from vlm.errors import UsageError
from vlm.linear_cross_entropy import Head, check_head, linear_cross_entropy
from vlm.lora import add_lora

TOKENS, VOCABULARY = 50, 288


@pytest.fixture
def in_chunks_of(monkeypatch):
    """Sets how many tokens a chunk has."""
    return lambda tokens: monkeypatch.setattr(module, "MOST_LOGITS", tokens * VOCABULARY)


def inputs_of() -> tuple[Tensor, Tensor]:
    """Tokens (2, 25), and labels (50,) that any family can be asked for."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(6, 250, shape, generator=generator) for shape in ((2, TOKENS // 2), (TOKENS,)))


def gradients(model, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def both(language_model, dtype: torch.dtype | None = None) -> tuple[tuple, tuple]:
    """Loss, right predictions and gradients: from full logits, and from hidden states."""
    ids, labels = inputs_of()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = language_model(input_ids=ids).logits.flatten(0, 1)
        expected = F.cross_entropy(logits.float(), labels, reduction="sum")
        hidden = language_model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
        total, right = linear_cross_entropy(language_model, hidden, labels)
    return (
        (expected, logits.argmax(-1) == labels, gradients(language_model, expected)),
        (total, right, gradients(language_model, total)),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("chunk", [TOKENS, 17])
def test_it_is_full_logits_and_cross_entropy(make_model, in_chunks_of, family, chunk):
    in_chunks_of(chunk)
    expected, found = both(make_model(family).language_model)
    assert torch.allclose(found[0], expected[0], rtol=1e-6)
    assert torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    errors = {name: relative_error(found[2][name], gradient) for name, gradient in expected[2].items()}
    # Keys have no influence through their bias: their gradient is nothing but rounding.
    assert {name: error for name, error in errors.items() if error > 1e-6 and expected[2][name].norm() > 1e-5} == {}


LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
OTHERS = {
    "soft-capped": lambda: hf.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.5),
    "scaled": lambda: hf.CohereConfig(**LLAMA, logit_scale=0.25),
    "divided": lambda: hf.GraniteConfig(**LLAMA, logits_scaling=8.0),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_scaled_and_capped_logits(in_chunks_of, kind):
    in_chunks_of(17)
    torch.manual_seed(0)
    expected, found = both(hf.AutoModelForCausalLM.from_config(OTHERS[kind]()).eval())
    assert torch.allclose(found[0], expected[0], rtol=1e-6) and torch.equal(found[1], expected[1])
    assert all(relative_error(found[2][name], expected[2][name]) < 1e-6 for name in expected[2])


@pytest.mark.parametrize("language", ["qwen2", "modernbert"])
def test_under_autocast_weights_gather_in_float32(make_model, in_chunks_of, language):
    """Whole and in many chunks, bf16 products are as far from those of float32; one bf16 sum over chunks would be farther."""
    language_model = make_model(language).language_model
    in_chunks_of(1)
    exact = both(language_model)[0]
    whole, chunked = both(language_model, torch.bfloat16)
    assert torch.allclose(chunked[0], exact[0], rtol=1e-2)
    head = [
        name for name in exact[2] if name.endswith(("embed_tokens.weight", "tok_embeddings.weight", "decoder.bias"))
    ]
    assert head
    for name in head:
        error = relative_error(whole[2][name], exact[2][name])
        assert relative_error(chunked[2][name], exact[2][name]) < 1.2 * error + 1e-6


def test_updates_beside_a_head_are_part_of_it(make_model, in_chunks_of):
    in_chunks_of(17)
    model = make_model("llama")
    language_model = model.language_model
    before = both(language_model)[1][0]
    add_lora(model, r=2)
    for name, parameter in language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected, found = both(language_model)
    assert torch.allclose(found[0], expected[0], rtol=1e-6) and not torch.allclose(found[0], before)
    assert all(relative_error(found[2][name], expected[2][name]) < 1e-6 for name in expected[2])


class Largest(TorchDispatchMode):
    """The most elements that a tensor made within had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_logits_of_all_tokens_never_exist(make_model, in_chunks_of):
    in_chunks_of(4)
    language_model = make_model("llama").language_model
    ids, labels = inputs_of()
    hidden = language_model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    largest = {}
    for name in ("chunked", "full"):
        with Largest() as seen:
            if name == "full":
                total = F.cross_entropy(Head(language_model)(hidden), labels, reduction="sum")
            else:
                total = linear_cross_entropy(language_model, hidden, labels).total
            total.backward(retain_graph=True)
        largest[name] = seen.elements
    head = VOCABULARY * language_model.config.hidden_size
    assert largest["full"] == TOKENS * VOCABULARY > head
    assert largest["chunked"] == head, "the gradient of the head's weight"


def test_nothing_to_predict_is_zero_with_a_gradient(make_model, in_chunks_of):
    language_model = make_model("llama").language_model
    hidden = torch.randn(3, 32, requires_grad=True)
    total, right = linear_cross_entropy(language_model, hidden[:0], torch.empty(0, dtype=torch.long))
    total.backward()
    assert total == 0 and right.shape == (0,)
    assert torch.count_nonzero(hidden.grad) == 0 and torch.count_nonzero(language_model.lm_head.weight.grad) == 0


def test_the_language_model_stays_as_it_is(make_model):
    language_model = make_model("opt").language_model
    before = dict(language_model.__dict__)
    Head(language_model)(torch.randn(3, 32))
    check_head(language_model)
    assert language_model.__dict__.keys() == before.keys()
    assert all(language_model.__dict__[name] is value for name, value in before.items())


def test_a_family_of_another_kind_is_refused_by_name(make_model, monkeypatch):
    language_model = make_model("llama").language_model
    plain = type(language_model).forward

    def skips(self, input_ids=None, inputs_embeds=None, **inputs):
        output = plain(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)
        if input_ids is not None:
            output.logits = output.logits + self.get_input_embeddings()(input_ids).sum(-1, keepdim=True)
        return output

    monkeypatch.setattr(type(language_model), "forward", skips)
    with pytest.raises(UsageError, match="family 'llama' makes its logits of more than its last hidden states"):
        check_head(language_model)
    monkeypatch.setattr(type(language_model), "forward", lambda self, input_ids: plain(self, input_ids=input_ids))
    with pytest.raises(UsageError, match="the head of language model family 'llama' cannot be called alone"):
        check_head(language_model)
