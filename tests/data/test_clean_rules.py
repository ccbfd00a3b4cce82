"""The rules of `vlm data clean`: the defaults document themselves, and every fault names its key and its line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from vlm.data_tools.clean_rules import Reason, Rules, load_rules, read_word_list
from vlm.errors import UsageError
from vlm.settings import annotated_yaml


def test_the_printed_defaults_read_back_equal(tmp_path: Path) -> None:
    printed = annotated_yaml(Rules())
    (tmp_path / "rules.yaml").write_text(printed)
    assert load_rules(tmp_path / "rules.yaml") == load_rules() == Rules()
    assert all("#" in line and line.split("#")[1].strip() for line in printed.splitlines()), "a setting says nothing"


def test_a_file_and_overrides_add_up(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("captions: {min_words: 3}\nprivate: {emails: drop}\n")
    rules = load_rules(
        tmp_path / "rules.yaml", ["private.phones=keep", "captions.max_words=9", "language.keep=[en, de]"]
    )
    assert (rules.captions.min_words, rules.captions.max_words) == (3, 9)
    assert (rules.private.emails, rules.private.phones, rules.private.cards) == ("drop", "keep", "mask")
    assert rules.language.keep == ["en", "de"] and rules.documents == Rules().documents


FAULTS = {
    "captions:\n  min_word: 3": "line 2: captions.min_word is not a known key; did you mean min_words?",
    "text:\n  repair: often": "line 2: text.repair is often; it should be true or false",
    "private:\n  emails: hide": "line 2: private.emails is hide; it should be 'mask', 'drop' or 'keep'",
    "\nduplicates: {by: colour}": "line 2: duplicates.by is colour; it should be 'pair', 'image', 'text' or 'none'",
    "duplicates:\n  jaccard: 0.3": "line 2: duplicates.jaccard is 0.3; it should be greater than or equal to 0.5",
    "duplicates:\n  distance: 40": "line 2: duplicates.distance is 40; it should be less than or equal to 6",
    "images: {max_aspect: 0.5}": "line 1: images.max_aspect is 0.5; it should be greater than or equal to 1",
    "captions: {min_words: 9, max_words: 4}": "line 1: captions: min_words 9 is above max_words 4; swap them",
    "language:\n  keep:\n  - en\n  - klingon": "line 4: language.keep.1: 'klingon' is no language that can be told; use ",
    "blocked:\n  words: [fine, '!!']": "line 2: blocked.words.1: '!!' has no letter or digit, and whole words are compared; ",
    "blocked:\n  files: [none.txt]": "line 2: blocked.files.0: none.txt can not be read (No such file or directory); give ",
    "agreement:\n  model: m\n  drop_lowest: 0.1\n  threshold: 0.2": "line 1: agreement: drop_lowest 0.1 and threshold 0.2",
    "agreement: {threshold: 0.2}": "line 1: agreement: model is missing; give the folder of a trained model",
    "agreement: {model: m}": "line 1: agreement: model m is set without drop_lowest or threshold; add one",
    "contamination: shards": "line 1: contamination is shards; it should be a list",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_names_key_and_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        load_rules(path)
    assert str(raised.value).startswith(f"{path} {FAULTS[text]}")
    assert "\n" not in str(raised.value)


def test_a_fault_of_the_command_line_is_said_to_be_one() -> None:
    with pytest.raises(UsageError, match=r"^command line: captons is not a known key; did you mean captions\?$"):
        load_rules(None, ["captons.min_words=3"])
    with pytest.raises(
        UsageError, match="^command line: agreement: drop_lowest 0.1 and threshold 0 are both set; remove"
    ):
        load_rules(None, ["agreement.drop_lowest=0.1", "agreement.threshold=0"])


def test_a_missing_file_of_rules_is_named() -> None:
    with pytest.raises(UsageError, match="nowhere.yaml cannot be read"):
        load_rules("nowhere.yaml")


def test_a_word_list_has_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\n# all of it\ntwo words  # of it\n")
    assert read_word_list(str(path)) == ["one", "two words"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="words.txt can not be read .it is not UTF-8 text.; give a file with one word"):
        load_rules(None, [f"blocked.files=[{path}]"])


def _setting(rules: BaseModel, key: str) -> Any:
    for name in key.split("."):
        rules = getattr(rules, name)
    return rules


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_names_a_rule_that_exists_and_survives_a_process(reason: Reason) -> None:
    assert pickle.loads(pickle.dumps(reason)) is reason and Reason(str(reason)) is reason
    if reason.rule:
        _setting(Rules(), reason.rule)


def test_only_what_no_rule_can_allow_has_no_rule() -> None:
    assert {reason for reason in Reason if not reason.rule} == {Reason.INVALID, Reason.UNREADABLE}


def test_rules_are_plain_values() -> None:
    rules = load_rules(None, ["blocked.words=[gun]", "contamination=[shards/test]"])
    assert Rules.model_validate(yaml.safe_load(annotated_yaml(rules))) == rules
    assert pickle.loads(pickle.dumps(rules)) == rules
