"""Who sees which picture, with open gates: exactly the text that must, and bit for bit nothing else."""

from __future__ import annotations

import pytest
import torch

IMAGE = 3
FAMILIES = ("gpt2", "llama", "qwen3", "gemma3_text", "opt", "gpt_neox", "smollm3", "phi3")


def tokens(length: int, seed: int) -> torch.Tensor:
    """Random tokens (length,), none of them special."""
    return torch.randint(6, 250, (length,), generator=torch.Generator().manual_seed(seed))


def pictures(n: int) -> torch.Tensor:
    """Random pixels (n, 3, 32, 32)."""
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def changed(pixels: torch.Tensor, picture: int) -> torch.Tensor:
    """The same pixels with one picture replaced."""
    other = pixels.clone()
    other[picture] = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(99))
    return other


@torch.no_grad()
def moved_states(model, first: torch.Tensor, second: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """(layers, B, L): where any hidden state after a layer, or a logit, differs between two sets of pixels."""
    runs = []
    for pixels in (first, second):
        output = model(pixel_values=pixels, output_hidden_states=True, **inputs)
        states = [*output.hidden_states[1:], output.logits]
        assert all(state.isfinite().all() for state in states)
        runs.append(states)
    return torch.stack([(a != b).any(dim=-1) for a, b in zip(*runs, strict=True)])


@torch.no_grad()
def moved_by_adapter(model, first: torch.Tensor, second: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """(B, L): where the one adapter of a model returns something else, before self-attention carries it on."""
    seen: list[torch.Tensor] = []
    (adapter,) = model.adapters.values()
    hook = adapter.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    for pixels in (first, second):
        model(pixel_values=pixels, **inputs)
    hook.remove()
    return (seen[0] != seen[1]).any(dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_before_a_picture_and_rows_without_it_stay_as_they_are(name, make_model):
    """Rows: padding, text, picture 0, text | text only | picture 1, text, picture 2, text."""
    model = make_model(name, gate_init=1.0)
    ids = torch.stack([tokens(12, seed) for seed in range(3)])
    ids[0, :3] = 0
    ids[0, 6] = ids[2, 1] = ids[2, 7] = IMAGE
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "image_slots": torch.tensor([[0, -1], [-1, -1], [1, 2]]),
    }
    pixels = pictures(3)
    for picture, row, first in ((0, 0, 6), (1, 2, 1), (2, 2, 7)):
        moved = moved_states(model, pixels, changed(pixels, picture), **inputs)
        assert moved[-1, row, first:].all()
        moved[:, row, first:] = False
        assert not moved.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_picture_a_row_needs_no_mask_and_leaks_nothing(name, make_model):
    model = make_model(name, gate_init=1.0)
    ids = torch.stack([tokens(10, seed) for seed in range(3)])
    ids[0, 4] = ids[2, 0] = IMAGE
    inputs = {"input_ids": ids, "image_slots": torch.tensor([[0], [-1], [1]])}
    pixels = pictures(2)
    for picture, row, first in ((0, 0, 4), (1, 2, 0)):
        moved = moved_states(model, pixels, changed(pixels, picture), **inputs)
        assert moved[-1, row, first:].all()
        moved[:, row, first:] = False
        assert not moved.any()


@pytest.mark.parametrize("name", [*FAMILIES, "bert", "modernbert", "mixtral"])
def test_an_adapter_shows_each_token_the_last_picture_before_it_only(name, make_model):
    """After a later picture, text sees that one; what self-attention carries on from earlier text is not the adapter's."""
    model = make_model(name, gate_init=1.0, layers=(0,))
    ids = tokens(12, 1)[None].clone()
    ids[0, [2, 5, 6]] = IMAGE
    pixels = pictures(3)
    for picture, span in ((0, range(2, 5)), (1, range(5, 6)), (2, range(6, 12))):
        moved = moved_by_adapter(model, pixels, changed(pixels, picture), input_ids=ids)
        assert moved[0].nonzero().flatten().tolist() == list(span)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3_text", "bert", "modernbert"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_documents_see_neither_each_other_nor_each_others_pictures(name, bidirectional, make_model):
    """One row: a document on picture 0, one on nothing, one on picture 1, padding."""
    model = make_model(name, gate_init=1.0)
    documents = torch.tensor([[1] * 5 + [2] * 4 + [3] * 5 + [0] * 2])
    token_image = torch.tensor([[-1] + [0] * 4 + [-1] * 4 + [-1] + [1] * 4 + [-1] * 2])
    ids = tokens(16, 3)[None].clone()
    ids[documents == 0] = 0
    inputs = {
        "document_ids": documents,
        "token_image": token_image,
        "image_slots": torch.tensor([[0, 1]]),
        "bidirectional": bidirectional,
    }
    pixels = pictures(2)
    reads_back = bidirectional or model.config.reading == "masked"
    for picture, document in ((0, 1), (1, 3)):
        moved = moved_states(model, pixels, changed(pixels, picture), input_ids=ids, **inputs)
        must = documents[0] == document if reads_back else token_image[0] == picture
        assert moved[-1, 0, must].all()
        moved[:, 0, must] = False
        assert not moved.any()
    other_text = ids.clone()
    other_text[0, 0] += 1
    with torch.no_grad():
        both = [model(input_ids=text, pixel_values=pixels, **inputs).logits for text in (ids, other_text)]
    assert torch.equal(both[0][0, 5:], both[1][0, 5:])


def test_a_batch_without_pictures_runs_the_adapters_on_a_blank_and_stays_the_language_model(make_model):
    """Every rank runs the same modules: gradients are connected and zero, and nothing is NaN."""
    model = make_model("qwen3", gate_init=1.0)
    ids = torch.stack([tokens(8, seed) for seed in range(2)])
    for slots in (torch.full((2, 1), -1), torch.full((2, 2), -1)):
        model.zero_grad()
        output = model(
            input_ids=ids,
            pixel_values=torch.zeros(1, 3, 32, 32),
            image_slots=slots,
            token_image=torch.full_like(ids, -1),
            labels=ids,
        )
        assert torch.equal(output.logits, model(input_ids=ids).logits)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith(("adapters.", "vision.trunk.blocks.")):
                assert parameter.grad is not None and not parameter.grad.any(), name


def test_pictures_and_places_that_differ_in_number_are_refused(make_model):
    import vlm

    model = make_model()
    ids = tokens(6, 0)[None].clone()
    ids[0, 2] = IMAGE
    with pytest.raises(vlm.UsageError, match="1 <image> places and 2 pictures"):
        model(input_ids=ids, pixel_values=pictures(2))
    with pytest.raises(vlm.UsageError, match=r"\(40, 40\) pixels came to a tower of \(32, 32\)"):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 40, 40))
