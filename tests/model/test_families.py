"""Every language model family: a new composite equals it, reloads exactly, looks where it should, and generates."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import vlm

IMAGE = 3
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")


def ids_with_image(rows: int = 2, length: int = 9, at: int = 2, seed: int = 1) -> torch.Tensor:
    """Random tokens (rows, length) with one `<image>` a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 250, (rows, length), generator=generator)
    ids[:, at] = IMAGE
    return ids


def pixels_of(n: int = 2, seed: int = 2) -> torch.Tensor:
    """Random pixels (n, 3, 32, 32)."""
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_zero_gates_leave_the_language_model_as_it_was(family, make_model, make_text_config):
    model = make_model(family)
    auto = hf.AutoModelForMaskedLM if model.config.reading == "masked" else hf.AutoModelForCausalLM
    untouched = auto.from_config(make_text_config(family)).eval()
    untouched.load_state_dict(model.language_model.state_dict())
    ids = ids_with_image()
    expected = untouched(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, pixel_values=pixels_of()).logits, expected)
    assert torch.equal(model(input_ids=ids).logits, expected)


@torch.no_grad()
def test_open_gates_let_pictures_in_and_leave_pure_text_alone(family, make_model):
    model = make_model(family, gate_init=1.0)
    ids = ids_with_image()
    untouched = model.language_model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, untouched)
    seeing = model(input_ids=ids, pixel_values=pixels_of()).logits
    assert not torch.allclose(seeing[:, 2:], untouched[:, 2:])


@torch.no_grad()
def test_a_saved_model_reloads_bit_equal(family, make_model, tmp_path):
    model = make_model(family, gate_init=1.0)
    ids, pixels = ids_with_image(), pixels_of()
    model.save_pretrained(tmp_path)
    again, report = vlm.VLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(
        again.eval()(input_ids=ids, pixel_values=pixels).logits, model(input_ids=ids, pixel_values=pixels).logits
    )


@torch.no_grad()
def test_bidirectional_reading_sees_later_tokens_and_causal_does_not(family, make_model):
    model = make_model(family)
    before, after = ids_with_image(rows=1), ids_with_image(rows=1)
    after[:, -1] = after[:, -1] + 1
    both = [model(input_ids=ids, bidirectional=True, output_hidden_states=True) for ids in (before, after)]
    moved = (both[0].hidden_states[-1] != both[1].hidden_states[-1]).any(dim=-1)
    assert moved.all()
    if model.config.reading == "causal":
        past = [model(input_ids=ids).logits for ids in (before, after)]
        if family in MIXTURES:  # experts work on groups of tokens, and rounding follows the size of a group
            torch.testing.assert_close(past[0][:, :-1], past[1][:, :-1])
        else:
            assert torch.equal(past[0][:, :-1], past[1][:, :-1])


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_documents_equal_documents_apart(family, bidirectional, make_model):
    """One row holds a document with a picture, one without, and one with another picture."""
    model = make_model(family, gate_init=1.0)
    pixels = pixels_of(2)
    lengths, picture_of_document = (6, 5, 7), (0, -1, 1)
    apart, parts = [], []
    for number, (length, picture) in enumerate(zip(lengths, picture_of_document, strict=True)):
        ids = ids_with_image(rows=1, length=length, at=1, seed=10 + number)
        parts.append(ids)
        seen = {} if picture < 0 else {"pixel_values": pixels[picture : picture + 1]}
        apart.append(model(input_ids=ids, bidirectional=bidirectional, **seen).logits)
    token_image = torch.cat(
        [
            torch.where(torch.arange(length) < 1, -1, picture)
            for length, picture in zip(lengths, picture_of_document, strict=True)
        ]
    )
    packed = model(
        input_ids=torch.cat(parts, dim=1),
        document_ids=torch.cat([torch.full((1, length), number + 1) for number, length in enumerate(lengths)], dim=1),
        token_image=token_image[None],
        pixel_values=pixels,
        image_slots=torch.tensor([[0, 1]]),
        bidirectional=bidirectional,
    ).logits
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), atol=1e-5, rtol=1e-5)


def test_generation_with_a_cache_batched_and_padded_equals_each_prompt_alone(causal_family, make_model):
    model = make_model(causal_family, gate_init=1.0)
    pixels = pixels_of(2)
    short, long = ids_with_image(rows=1, length=5, at=1, seed=5), ids_with_image(rows=1, length=9, at=4, seed=6)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [
        model.generate(ids, pixel_values=pixels[row : row + 1], use_cache=False, **settings)[0, ids.shape[1] :]
        for row, ids in enumerate((short, long))
    ]
    padding = torch.zeros((1, 4), dtype=torch.long)
    ids = torch.cat([torch.cat([padding, short], dim=1), long])
    together = model.generate(ids, attention_mask=(ids != 0).long(), pixel_values=pixels, **settings)[:, 9:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize(
    "config",
    [
        hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
        hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        hf.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2),
        hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2),  # whose rotary part is wider than such a head
        hf.T5Config(vocab_size=64, d_model=32, num_layers=2, num_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_families_that_drop_the_keyword_are_refused_by_name(config, make_model):
    vision = make_model().config.vision
    with pytest.raises(vlm.UsageError, match=config.model_type) as refusal:
        vlm.VLMModel(vlm.VLMConfig(vision=vision, text_config=config, adapter={}, image_token_id=3))
    assert "\n" not in str(refusal.value)
