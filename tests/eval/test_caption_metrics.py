"""Tokens and caption metrics against outputs of coco-caption, against the formulas, and by hand."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import RunError, UsageError
from vlm.eval.metrics import java
from vlm.eval.metrics.caption import CaptionSet, bleu, caption_metrics, caption_scores, cider, rouge_l
from vlm.eval.metrics.tokenizer import (
    ABBREVIATIONS,
    CAPITAL_ABBREVIATIONS,
    DROPPED,
    SPLIT_WORDS,
    tokenize,
    tokenize_all,
    tokens,
)

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = json.loads((GOLDENS / "captions.json").read_text("utf-8"))
MANY = json.loads(gzip.decompress((GOLDENS / "many.json.gz").read_bytes()))


def test_tokens_are_those_of_the_java_program() -> None:
    wrong = {caption: tokenize(caption) for caption, gold in GOLDEN["tokens"].items() if tokenize(caption) != gold}
    assert len(GOLDEN["tokens"]) > 900
    assert len(wrong) / len(GOLDEN["tokens"]) <= 0.002, wrong


def test_tokens_of_thousands_are_those_of_the_java_program() -> None:
    """Ordinary, adversarial, very long and empty ones, each read with the one after it as the Java program does."""
    wrong, seen = [], 0
    for kind, gold in MANY["tokens"].items():
        ours = tokenize_all(gold["captions"])
        differing = [
            text for text, mine, java in zip(gold["captions"], ours, gold["tokens"], strict=True) if mine != java
        ]
        assert kind == "adversarial" or not differing, (kind, differing)
        wrong, seen = wrong + differing, seen + len(ours)
    assert seen > 6000
    assert len(wrong) / seen <= 0.002, wrong


def test_simple_captions_come_apart_as_by_the_rules() -> None:
    rng = random.Random(0)
    words = [word.replace("|", "") for word in SPLIT_WORDS] + ABBREVIATIONS + CAPITAL_ABBREVIATIONS + list("aAbBiIx")
    words += "cannot Gonna red dog sitting The street TV PhD".split()
    for _ in range(5000):
        text = "".join(rng.choice(words) + rng.choice([" ", " ", ", ", "  "]) for _ in range(rng.randint(1, 6)))
        text = text.rstrip(", ") + rng.choice(["", ".", " .", ". "])
        assert tokenize(text) == " ".join(token for token in tokens(text) if token not in DROPPED), text


def test_a_letter_at_the_end_is_an_initial_if_the_next_caption_goes_on() -> None:
    assert tokenize_all(["a man called J.", "smith waits"]) == ["a man called j.", "smith waits"]
    assert tokenize_all(["vitamin C.", "The dog sleeps"]) == ["vitamin c", "the dog sleeps"]
    assert tokenize_all(["vitamin C."]) == ["vitamin c"]
    assert tokenize_all([]) == []


def test_tokens_of_a_caption_are_a_fixed_point_for_plain_words() -> None:
    once = tokenize("A small, red circle isn't left of the two blue stars.")
    assert once == "a small red circle is n't left of the two blue stars"
    assert tokens("(a) it's") == ["-lrb-", "a", "-rrb-", "it", "'s"]


def test_metrics_are_those_of_coco_caption() -> None:
    pictures = GOLDEN["pictures"]
    ours = caption_metrics(
        {i: p["candidate"] for i, p in enumerate(pictures)}, {i: p["references"] for i, p in enumerate(pictures)}
    )
    assert ours == pytest.approx(GOLDEN["metrics"], abs=1e-12)


def test_metrics_of_hundreds_are_those_of_coco_caption() -> None:
    """From the tokens of the Java program to the last digit; from the captions, where some tokens differ, nearly."""
    gold = MANY["captions"]
    same = caption_scores(CaptionSet(gold["candidate_tokens"], gold["reference_tokens"]))
    assert {name: score for name, (score, _) in same.items()} == pytest.approx(gold["metrics"], abs=1e-9)
    whole = caption_metrics(dict(enumerate(gold["candidates"])), dict(enumerate(gold["references"])))
    assert whole == pytest.approx(gold["metrics"], abs=5e-4)


def test_metrics_of_each_picture_are_those_of_coco_caption() -> None:
    candidates = [tokenize(picture["candidate"]) for picture in GOLDEN["pictures"]]
    references = [[tokenize(reference) for reference in picture["references"]] for picture in GOLDEN["pictures"]]
    for n, scores in enumerate(zip(*bleu(candidates, references)[1], strict=True), start=1):
        assert scores == pytest.approx(GOLDEN["each"][f"Bleu_{n}"], abs=1e-12)
    assert rouge_l(candidates, references)[1] == pytest.approx(GOLDEN["each"]["ROUGE_L"], abs=1e-12)
    assert cider(candidates, references)[1] == pytest.approx(GOLDEN["each"]["CIDEr"], abs=1e-12)


def test_bleu_by_hand() -> None:
    # "the" is clipped at 2 of 7; 0 of 6 pairs; the candidate is longer than the reference of 6, so no penalty.
    corpus, _ = bleu(["the the the the the the the"], [["the cat is on the mat"]])
    assert corpus[0] == pytest.approx(2 / 7)
    assert corpus[1] < 1e-6
    # All words right but too short: exp(1 - 6/3).
    corpus, _ = bleu(["the cat is"], [["the cat is on the mat"]])
    assert corpus[:3] == pytest.approx([math.exp(-1)] * 3)


def test_rouge_by_hand() -> None:
    # Longest common subsequence "a red dog" of 3; precision 3/4, recall 3/5.
    score, _ = rouge_l(["a big red dog"], [["a red and happy dog"]])
    assert score == pytest.approx((1 + 1.44) * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))


def test_cider_is_its_formula_in_float64() -> None:
    """Equation 6 of Vedantam et al. with dense vectors over all n-grams of the set."""
    candidates = ["a red circle", "a blue blue star left of a circle", "two stars"]
    references = [["a red circle", "one red circle"], ["a blue star left of a red circle"], ["two big stars", "stars"]]

    def grams(text: str, n: int) -> list[str]:
        words = text.split()
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    total = 0.0
    for candidate, refs in zip(candidates, references, strict=True):
        for n in range(1, 5):
            names = sorted({g for text in [candidate, *sum(references, [])] for g in grams(text, n)})
            seen = np.array([sum(any(g in grams(r, n) for r in rs) for rs in references) for g in names])
            idf = np.log(len(candidates)) - np.log(np.maximum(1, seen))
            ours = np.array([grams(candidate, n).count(g) for g in names]) * idf
            for ref in refs:
                theirs = np.array([grams(ref, n).count(g) for g in names]) * idf
                norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
                cosine = np.minimum(ours, theirs) @ theirs / norms if norms else 0.0
                apart = len(grams(candidate, 2)) - len(grams(ref, 2))
                total += 10 / 4 / len(refs) / len(candidates) * cosine * np.exp(-(apart**2) / 72)
    assert cider(candidates, references)[0] == pytest.approx(total, abs=1e-12)


def test_a_perfect_caption_beats_a_shuffled_one() -> None:
    references = [["a red circle on the left"], ["two small blue stars"], ["a big green square above a star"]]
    perfect = [refs[0] for refs in references]
    moved = perfect[1:] + perfect[:1]
    assert cider(perfect, references)[0] == pytest.approx(10.0)
    for metric in (
        lambda c: bleu(c, references)[0][0],
        lambda c: rouge_l(c, references)[0],
        lambda c: cider(c, references)[0],
    ):
        assert metric(moved) < metric(perfect)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider])
def test_counts_that_do_not_fit_are_an_error(metric) -> None:
    for candidates, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="one candidate and at least one reference"):
            metric(candidates, references)


def test_captions_without_a_word_score_nothing() -> None:
    scores = caption_scores(CaptionSet(["", "a dog"], [[""], ["", "a dog"]]))
    assert scores["CIDEr"][1][0] == 0.0
    assert all(math.isfinite(score) for score, _ in scores.values())
    assert caption_scores(CaptionSet([""], [[""]]))["Bleu_1"][0] == pytest.approx(0.0, abs=1e-6)


def test_longest_common_subsequences_are_those_of_the_table() -> None:
    def by_table(a: list[str], b: list[str]) -> int:
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(1, 90))] for _ in range(2))
        common = by_table(a, b)
        precision, recall = common / len(a), common / len(b)
        expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if common else 0.0
        assert rouge_l([" ".join(a)], [[" ".join(b)]])[0] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------- METEOR and SPICE

PAIR = CaptionSet(
    ["a red dog runs", "two cats"], [["a red dog is running", "a dog"], ["two cats sit", "a pair of cats"]]
)


@pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs Java and pycocoevalcap",
)
def test_meteor_is_that_of_the_package() -> None:
    """`Meteor().compute_score` of pycocoevalcap 1.2 on the same captions."""
    score, each = java.java_scores(PAIR, ["METEOR"])["METEOR"]
    assert (score, each) == (pytest.approx(0.34952448), pytest.approx([0.38928974, 0.29170666]))


def test_a_missing_java_or_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert java.java_scores(PAIR, []) == {}
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="METEOR runs on Java, and no `java`"):
        java.java_scores(PAIR, ["METEOR"])
    monkeypatch.setattr(java.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setitem(java._CLASSES, "METEOR", "no_such_package.meteor.Meteor")
    with pytest.raises(UsageError, match=r"METEOR needs a package .*pip install 'vlm\[java\]'"):
        java.java_scores(PAIR, ["METEOR"])


def test_a_java_program_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def compute_score(self, references, candidates):
            raise OSError("no\nmemory")

    class Nothing:
        def compute_score(self, references, candidates):
            return math.nan, [{"All": {"f": math.nan}}]

    for program, said in ((Broken, r"failed \(no memory\)"), (Nothing, "gave nan for 1 pictures")):
        monkeypatch.setattr(java, "_scorer_class", lambda name, program=program: program)
        with pytest.raises(RunError, match=said):
            java.java_scores(PAIR, ["SPICE"])
