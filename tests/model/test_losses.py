"""Losses: tokens, masking, and contrastive losses over ranks that hold unequal numbers of pairs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor
from torch import distributed as dist

from vlm.losses import (
    IGNORED,
    count_targets,
    documents_right,
    gather_rows,
    infonce,
    labelled,
    mask_tokens,
    siglip,
)

# Pairs that each of two ranks holds.
SPLITS = {"even": (2, 2), "uneven": (3, 1), "one has none": (0, 4), "none at all": (0, 0)}
LOSSES = {"infonce": infonce, "siglip": lambda *given: siglip(*given, torch.tensor(-2.0))}


def pairs_of(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures and texts (count, 8), unit length, and the scale; all ask for gradients."""
    generator = torch.Generator().manual_seed(5)
    images, texts = (F.normalize(torch.randn(4, 8, generator=generator)[:count], dim=-1) for _ in range(2))
    return images.requires_grad_(), texts.requires_grad_(), torch.tensor(3.0, requires_grad=True)


def on_a_rank(folder: Path) -> None:
    """What one of two ranks finds: for every loss and split its loss, top-1, mean number of pairs, and gradients."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for loss_name, loss_of in LOSSES.items():
        for split_name, split in SPLITS.items():
            images, texts, scale = pairs_of(sum(split))
            first = sum(split[:rank])
            own = slice(first, first + split[rank])
            own_images, own_texts = (rows.detach()[own].requires_grad_() for rows in (images, texts))
            loss, top, mean = loss_of(own_images, own_texts, scale)
            loss.backward()
            found[loss_name, split_name] = loss.detach(), top, mean, own_images.grad, own_texts.grad, scale.grad
    rows = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    gathered, first = gather_rows(rows)
    (gathered * torch.tensor([[1.0], [10.0], [100.0]]) * (rank + 1)).sum().backward()
    found["gather"] = gathered.detach(), first, rows.grad
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What two real processes find."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, __file__, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_rows_of_all_ranks_stand_in_rank_order(ranks):
    for rank, first in ((0, 0), (1, 1)):
        gathered, found_first, _ = ranks[rank]["gather"]
        assert gathered.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]] and found_first == first


def test_the_gradient_of_gathering_is_the_sum_of_what_every_rank_asks_for(ranks):
    assert ranks[0]["gather"][2].tolist() == [[3.0, 3.0]]
    assert ranks[1]["gather"][2].tolist() == [[30.0, 30.0], [300.0, 300.0]]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_equal_one(ranks, loss, split):
    images, texts, scale = pairs_of(sum(SPLITS[split]))
    whole, top, pairs = LOSSES[loss](images, texts, scale)
    whole.backward()
    first, second = (rank[loss, split] for rank in ranks)
    assert torch.allclose(first[0] + second[0], whole.detach(), rtol=1e-5)
    assert int(first[1] + second[1]) == int(top)
    assert first[2] == second[2] == pairs / 2
    assert torch.allclose(torch.cat([first[3], second[3]]), images.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(torch.cat([first[4], second[4]]), texts.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(first[5] + second[5], scale.grad, rtol=1e-4, atol=1e-6)


def test_alone_rows_are_gathered_as_they_are():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) == (rows, 0)


def test_contrastive_losses_against_float64():
    images, texts, scale = pairs_of(4)
    logits = scale.double() * images.double() @ texts.double().T
    by_image, by_text = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    assert torch.allclose(infonce(images, texts, scale)[0].double(), -(by_image + by_text).sum() / 2, rtol=1e-5)
    signs = 2 * torch.eye(4, dtype=torch.float64) - 1
    expected = (1 + torch.exp(-signs * (logits - 2))).log().sum()
    assert torch.allclose(siglip(images, texts, scale, torch.tensor(-2.0))[0].double(), expected, rtol=1e-5)


def test_labelled_tokens_are_predicted_from_before_or_in_place():
    logits = torch.arange(8.0).reshape(1, 4, 2)
    labels = torch.tensor([[1, IGNORED, 0, 1]])
    predictions, found = labelled(logits, labels, shift=True)
    assert found.tolist() == [0, 1] and predictions.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    predictions, found = labelled(logits, labels, shift=False)
    assert found.tolist() == [1, 0, 1] and predictions.tolist() == [[0.0, 1.0], [4.0, 5.0], [6.0, 7.0]]
    assert (count_targets(labels, True), count_targets(labels, False)) == (2, 3)


def test_a_document_is_right_if_every_labelled_token_is():
    documents = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED, 7, IGNORED], [IGNORED, IGNORED, 5, IGNORED, IGNORED, 6]])
    right = torch.tensor([True, True, False, True, True])
    assert documents_right(right, labels, documents, 2).tolist() == [[True, False], [True, True]]
    assert documents_right(~right, labels, documents, 2).tolist() == [[False, True], [True, False]]


def test_masking_labels_what_it_chose_and_nothing_else():
    ids = torch.arange(10, 10_010).reshape(2, 5000)
    maskable = ids % 2 == 0
    generator = torch.Generator().manual_seed(0)
    hidden, labels = mask_tokens(ids, maskable, 0.5, 1, torch.tensor([3, 4]), generator)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(hidden[~chosen], ids[~chosen])
    assert not chosen[~maskable].any()
    changed = hidden[chosen & (hidden != ids)]
    assert set(changed.tolist()) == {1, 3, 4}
    same = mask_tokens(ids, maskable, 0.5, 1, torch.tensor([3, 4]), torch.Generator().manual_seed(0))
    assert torch.equal(hidden, same[0]) and torch.equal(labels, same[1])


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]))
