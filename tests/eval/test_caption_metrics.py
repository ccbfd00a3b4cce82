"""Tokens and caption metrics against outputs of coco-caption, against the formulas, and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vlm.eval.metrics.caption import bleu, caption_metrics, cider, rouge_l
from vlm.eval.metrics.tokenizer import tokenize, tokens

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "captions.json").read_text("utf-8"))


def test_tokens_are_those_of_the_java_program() -> None:
    wrong = {caption: tokenize(caption) for caption, gold in GOLDEN["tokens"].items() if tokenize(caption) != gold}
    assert len(GOLDEN["tokens"]) > 900
    assert len(wrong) / len(GOLDEN["tokens"]) <= 0.002, wrong


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
