"""The settings of a reply: what they may be, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from vlm.errors import UsageError
from vlm.generation.decoding import Decoding


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
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
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting, value, wanted):
    with pytest.raises(UsageError) as refusal:
        Decoding(**{setting: value})
    assert str(refusal.value) == f"{setting} is {value}; it must be {wanted}"


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
