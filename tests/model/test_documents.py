"""Rows of documents: who attends to whom, and that a long text alone in its row builds nothing of its length squared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.documents import document_mask, one_document_each

PACKED = [[1, 1, 2, 2, 2, 0]]
ALONE = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "alone"),
    [(ALONE, True), (PACKED, False), ([[2, 2, 0]], True), ([[0, 0, 1]], False), ([[1, 0, 1]], False), ([[0, 0]], True)],
)
def test_one_document_a_row(rows, alone):
    assert one_document_each(torch.tensor(rows)) is alone


@pytest.mark.parametrize("rows", [PACKED, ALONE])
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_attends_within_its_document(rows, causal):
    ids = torch.tensor(rows)
    allowed = document_mask(ids, causal)
    assert allowed.shape == (len(rows), 1, 1 if rows == ALONE and not causal else 6, 6)
    allowed = allowed.expand(-1, -1, 6, -1)
    for row, documents in enumerate(rows):
        for query in [place for place in range(6) if documents[place]]:
            seen = [key for key in range(6) if documents[key] == documents[query] and (key <= query or not causal)]
            assert allowed[row, 0, query].nonzero().flatten().tolist() == seen
    assert allowed.any(-1).all(), "softmax over nothing is not a number"


class Largest(TorchDispatchMode):
    """The most elements that a tensor made within has memory for."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize(
    ("language", "bidirectional"),
    [("qwen3", False), ("gpt2", False), ("gpt_neox", False), ("qwen3", True), ("modernbert", False)],
)
def test_a_text_alone_in_its_row_takes_memory_by_its_length(make_model, language, bidirectional):
    """Modernbert attends to neighbours alone in most layers, by a mask that its family makes."""
    model, length = make_model(language), 240
    most = {}
    for padding in (0, 40):
        documents = torch.ones(2, length, dtype=torch.long)
        documents[1, length - padding :] = 0
        with Largest() as seen:
            hidden = model.states(
                torch.full((2, length), 9), document_ids=documents, bidirectional=bidirectional
            ).last_hidden_state
            hidden.sum().backward()
        most[padding] = seen.elements
    squared = 2 * length * length
    assert max(most.values()) < squared if language != "modernbert" else most[40] >= squared


@pytest.mark.parametrize("language", ["qwen3", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_padded_text_is_read_as_it_is_alone(make_model, language, bidirectional):
    model = make_model(language)
    ids = torch.randint(6, 250, (1, 100), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([ids, torch.zeros(1, 12, dtype=torch.long)], dim=1)
    documents = (torch.arange(112) < 100).long()[None]
    with torch.no_grad():
        alone = model.states(ids, bidirectional=bidirectional).last_hidden_state
        found = model.states(padded, document_ids=documents, bidirectional=bidirectional).last_hidden_state
    assert torch.allclose(found[:, :100], alone, rtol=1e-4, atol=1e-5)
