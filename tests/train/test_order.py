"""The order of samples: every one once an epoch, a function of seed and position alone, sources by their weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlm.train.order import BLOCK, Order, _shares


def positions(order: Order, first: int, last: int) -> list[tuple[int, int]]:
    return [order.at(position) for position in range(first, last)]


def test_every_epoch_holds_every_sample_once_in_a_new_order():
    order = Order([7], [1.0], [0, 0])
    epochs = [[index for _, index in positions(order, 7 * epoch, 7 * epoch + 7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_every_epoch_of_every_source_holds_every_sample_once():
    order = Order([5, 300], [1.0, 3.0], [0, 0])
    visits: dict[int, list[int]] = {0: [], 1: []}
    for source, index in positions(order, 0, 2 * BLOCK):
        visits[source].append(index)
    for source, length in ((0, 5), (1, 300)):
        for first in range(0, len(visits[source]) - length + 1, length):
            assert sorted(visits[source][first : first + length]) == list(range(length))


def test_a_position_is_the_same_whatever_was_asked_before():
    asked = np.random.default_rng(0).permutation(3 * BLOCK)[:300]
    walked = positions(Order([13, 40], [1.0, 2.0], [3, 1]), 0, 3 * BLOCK)
    jumping = Order([13, 40], [1.0, 2.0], [3, 1])
    assert all(jumping.at(int(position)) == walked[position] for position in asked)


def test_weights_hold_in_every_block():
    order = Order([10, 1000, 3], [1.0, 2.0, 5.0], [0, 0])
    for block in range(3):
        counts = Counter(source for source, _ in positions(order, block * BLOCK, (block + 1) * BLOCK))
        assert counts == {0: BLOCK // 8, 1: BLOCK // 4, 2: 5 * BLOCK // 8}


def test_sources_are_mixed_within_a_block():
    sources = [source for source, _ in positions(Order([50, 50], [1.0, 1.0], [0, 0]), 0, 64)]
    assert 16 < sum(sources) < 48


@pytest.mark.parametrize("lengths", [[40], [40, 60]])
def test_seeds_decide(lengths):
    weights = [1.0] * len(lengths)
    orders = {seed: tuple(positions(Order(lengths, weights, seed), 0, 80)) for seed in ((0, 0), (0, 1), (1, 0), (1, 1))}
    assert len(set(orders.values())) == 4
    assert orders[0, 1] == tuple(positions(Order(lengths, weights, [0, 1]), 0, 80))


def test_without_shuffling_samples_come_as_they_are_stored():
    order = Order([3], [1.0], [0, 0], shuffle=False)
    assert [index for _, index in positions(order, 0, 7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, 1e-9], [1e-9, 1e-9, 1.0], [1.0, 1.0, 1.0], [1e-12] * 5 + [1e6], [3.0, 7.0, 11.0], [0.4, 0.4, 0.2]],
)
def test_shares_add_up_and_leave_nobody_out(weights):
    shares = _shares(weights, BLOCK)
    exact = np.asarray(weights) / sum(weights) * BLOCK
    assert shares.sum() == BLOCK and shares.min() >= 1
    assert np.all(np.abs(shares - np.maximum(1, exact)) <= len(weights))


def test_what_gives_way_is_followed_by_the_next_of_its_own_epoch():
    order = Order([7], [1.0], [0])
    assert [order.at(3, shift)[1] for shift in range(4)] == [order.at(3 + place)[1] for place in range(4)]
    assert sorted(order.at(3, shift)[1] for shift in range(7)) == list(range(7)), "all of the source are tried"
