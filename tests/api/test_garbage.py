"""Work that Python's collector does not look through; what it did before it does afterwards."""

from __future__ import annotations

import gc

import pytest

from vlm.garbage import uncollected


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_rests_meanwhile_and_is_as_it_was_afterwards(collects):
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_what_was_made_meanwhile_is_old_at_once():
    """Not new, and looked through by the next collection of what is new."""
    assert gc.isenabled()
    gc.unfreeze()  # the suite has frozen what it imported
    try:
        with uncollected():
            made: list[object] = [object]
        assert any(one is made for one in gc.get_objects(generation=2))
    finally:
        gc.freeze()


def test_what_was_frozen_stays_so():
    gc.freeze()
    with uncollected():
        pass
    assert gc.get_freeze_count()
