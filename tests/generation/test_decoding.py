"""The settings of a reply: what they may be, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vlm.errors import UsageError
from vlm.generation.choosing import Chooser, choose
from vlm.generation.decoding import Decoding


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.1, "at least 0 and at most 1e+06"),
        ("temperature", float("nan"), "at least 0 and at most 1e+06"),
        ("temperature", float("inf"), "at least 0 and at most 1e+06"),
        ("top_k", 0, "at least 1"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("min_p", -0.1, "at least 0 and at most 1"),
        ("min_p", 1.1, "at least 0 and at most 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", float("inf"), "above 0"),
        ("num_beams", 0, "at least 1"),
        ("length_penalty", float("nan"), "at least -10 and at most 10"),
        ("length_penalty", 10.1, "at least -10 and at most 10"),
        ("early_stopping", "always", "True, False or 'never'"),
        ("stop", 3, "a string or a list of strings"),
        ("stop", ["a", 3], "a string or a list of strings"),
        ("stop", b"a", "a string or a list of strings"),
        ("seed", 1.5, "a whole number"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting, value, wanted):
    with pytest.raises(UsageError) as refusal:
        Decoding(**{setting: value})
    assert str(refusal.value) == f"{setting} is {value}; it must be {wanted}"


@pytest.mark.parametrize("tiny", [1e-7, 1e-40, 5e-324])
def test_a_draw_as_narrow_as_can_be_takes_the_likeliest(tiny):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for narrow in (Decoding(temperature=tiny), Decoding(temperature=1.0, top_p=tiny)):
        tokens, _ = choose(logits, [Chooser(narrow)] * 4, [[]] * 4)
        assert tokens == logits.argmax(dim=-1).tolist()


def test_any_whole_number_is_a_seed():
    seeds = [0, 7, -1, -2, 2**70, np.int64(-5)]
    drawn = [[Chooser(Decoding(seed=seed)).random.initial_seed() for _ in range(2)] for seed in seeds]
    assert all(first == second for first, second in drawn)
    assert len({first for first, _ in drawn}) == len(seeds)


@pytest.mark.parametrize("setting", ["top_k", "top_p", "min_p"])
def test_what_narrows_a_draw_needs_one(setting):
    with pytest.raises(UsageError, match=f"{setting} is 1 and temperature is 0, which does not sample; raise one"):
        Decoding(**{setting: 1})


def test_beams_do_not_sample():
    with pytest.raises(UsageError, match="num_beams is 2 and temperature is 0.5; beams do not sample"):
        Decoding(num_beams=2, temperature=0.5)


def test_settings_do_not_change_and_one_stop_string_is_a_list_of_one():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Decoding().temperature = 1.0
    assert Decoding(stop="\n").stop == Decoding(stop=["\n"]).stop == ("\n",)


@pytest.mark.parametrize(("setting", "value"), [("length_penalty", 2.0), ("early_stopping", True)])
def test_what_judges_a_search_needs_one(setting, value):
    with pytest.raises(
        UsageError, match=f"{setting} is {value} and num_beams is 1, which searches nothing; raise num_beams"
    ):
        Decoding(**{setting: value})
