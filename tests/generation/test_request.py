"""A reply in the making: what it is worth beside its like."""

from __future__ import annotations

import pytest

from vlm.generation.decoding import Decoding
from vlm.generation.request import Generation, Prompt


@pytest.mark.parametrize(
    ("settings", "told", "worth"),
    [
        ({}, [(9, -1.0, False), (8, -2.0, False), (1, -6.0, True)], -3.0),
        ({"max_new_tokens": 2}, [(9, -1.0, False), (8, -2.0, False)], -1.5),
        ({"stop": "#"}, [(9, -1.0, False), (8, -4.0, False)], -2.5),
        ({}, [(1, -2.0, True)], -2.0),
    ],
)
def test_a_reply_is_worth_the_mean_of_what_was_said(make_tokenizer, settings, told, worth):
    """The end counts where it was said, and only there."""
    decoding = Decoding(**settings)
    reply = Generation(Prompt([9]), decoding, make_tokenizer(), decoding.max_new_tokens)
    for token in told:
        reply.add(*token)
    assert reply.finish_reason is not None and reply.best(1)[0][0] == worth
