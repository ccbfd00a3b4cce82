"""Generation by Hugging Face's `generate` over the composite: pictures are encoded once, beams and masks keep their rows."""

from __future__ import annotations

import pytest
import torch

import vlm

IMAGE = 3
PLAIN = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def prompts():
    """Left-padded prompts (3, 9) with 1, 0 and 2 pictures, and their slots."""
    ids = torch.randint(6, 250, (3, 9), generator=torch.Generator().manual_seed(4))
    ids[0, :4], ids[1, :2] = 0, 0
    ids[0, 5] = ids[2, 0] = ids[2, 4] = IMAGE
    return ids, torch.tensor([[0, -1], [-1, -1], [1, 2]])


@pytest.fixture
def pixels():
    """Three pictures."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_pictures_are_encoded_once_and_every_row_keeps_its_own(extra, make_model, prompts, pixels):
    model = make_model(gate_init=1.0)
    ids, slots = prompts
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    together = model.generate(
        ids, attention_mask=(ids != 0).long(), pixel_values=pixels, image_slots=slots, **PLAIN, **extra
    )[:, 9:]
    hook.remove()
    assert calls == [3]
    for row in range(3):
        own = pixels[slots[row][slots[row] >= 0]]
        seen = {"pixel_values": own} if len(own) else {}
        assert torch.equal(
            model.generate(ids[row][ids[row] != 0][None], **seen, **PLAIN, **extra)[0, -6:], together[row]
        )


def test_what_is_generated_follows_the_picture_and_leaves_nothing_behind(make_model, prompts, pixels):
    model = make_model(gate_init=2.0)
    ids = prompts[0][:1, 4:]
    before = set(vars(model)), {name: set(vars(module)) for name, module in model.named_modules()}
    first, other = (model.generate(ids, pixel_values=picture[None], **PLAIN) for picture in pixels[:2])
    assert not torch.equal(first, other)
    assert torch.equal(first, model.generate(ids, pixel_values=pixels[:1], **PLAIN))
    assert before == (set(vars(model)), {name: set(vars(module)) for name, module in model.named_modules()})


def test_beams_equal_an_exhaustive_search(make_model, pixels):
    """With as many beams as words, two tokens are searched completely."""
    model = make_model(gate_init=1.0)
    ids = torch.tensor([[7, IMAGE, 9, 11]])
    found = model.generate(
        ids, pixel_values=pixels[:1], **{**PLAIN, "max_new_tokens": 2}, num_beams=288, length_penalty=0.0
    )
    with torch.no_grad():
        first = model(input_ids=ids, pixel_values=pixels[:1]).logits[0, -1].log_softmax(-1)
        rows = torch.cat([ids.expand(288, -1), torch.arange(288)[:, None]], dim=1)
        rows_slots = torch.zeros(288, 1, dtype=torch.long)
        token_image = torch.tensor([[-1, 0, 0, 0, 0]]).expand(288, -1)
        second = model(input_ids=rows, pixel_values=pixels[:1], image_slots=rows_slots, token_image=token_image).logits[
            :, -1
        ]
        total = first[:, None] + second.log_softmax(-1)
        total[IMAGE] = total[:, IMAGE] = -torch.inf
    best = divmod(int(total.argmax()), 288)
    assert found[0, 4:].tolist() == list(best)


def test_a_picture_place_is_never_generated(make_model, pixels):
    model = make_model(gate_init=1.0)
    with torch.no_grad():
        model.language_model.lm_head.weight[IMAGE] = 0
        model.language_model.model.norm.weight.zero_()  # every logit is 0, so that the lowest ids win: 0, then 1, …
    model.generation_config.suppress_tokens += [0, 1, 2]
    out = model.generate(torch.tensor([[7, IMAGE]]), pixel_values=pixels[:1], **PLAIN)
    assert out[0, 2:].tolist() == [4] * 6


def test_encoder_families_refuse_to_generate(make_model):
    with pytest.raises(vlm.UsageError, match="'bert' reads both ways"):
        make_model("bert").generate(torch.tensor([[7, 8]]))


def test_the_loss_is_of_the_next_token_or_of_the_token_itself(make_model):
    ids = torch.randint(6, 250, (2, 8))
    labels = torch.where(torch.rand(2, 8) < 0.5, ids, -100)
    labels[:, 3] = ids[:, 3]
    with torch.no_grad():
        for family, shift, bidirectional in (("qwen3", 1, False), ("qwen3", 1, True), ("bert", 0, False)):
            output = make_model(family)(input_ids=ids, labels=labels, bidirectional=bidirectional)
            told = output.logits.log_softmax(-1)
            terms = [
                -told[row, column - shift, labels[row, column]]
                for row in range(2)
                for column in range(shift, 8)
                if labels[row, column] >= 0
            ]
            torch.testing.assert_close(output.loss, torch.stack(terms).mean())


@torch.no_grad()
def test_text_embeddings_ignore_padding(make_model):
    for family in ("qwen3", "gpt2", "bert"):
        model = make_model(family)
        short, long = torch.randint(6, 250, (1, 5)), torch.randint(6, 250, (1, 9))
        ids = torch.cat([torch.nn.functional.pad(short, (0, 4)), long])
        together = model.encode_text(ids, (ids != 0).long())
        torch.testing.assert_close(together[:1], model.encode_text(short, torch.ones_like(short)))
        torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))
