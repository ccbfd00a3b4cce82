"""BLEU, ROUGE-L and CIDEr of captions as coco-caption computes them. Knows tokens and formulas; nothing of files.

Every function takes captions as `tokenizer.tokenize` leaves them (lower-cased tokens joined by single spaces), one
candidate and at least one reference a picture, and returns the score of the whole set and the score of each picture.
Held to github.com/tylin/coco-caption (`pycocoevalcap`), quirks included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from .tokenizer import tokenize

LONGEST_NGRAM = 4
# BLEU: keeps 0/0 at 0 and n/0 finite.
TINY, SMALL = 1e-15, 1e-9
# ROUGE-L: how much more recall weighs than precision.
BETA = 1.2
# CIDEr-D: width of the Gaussian penalty on a difference in length.
SIGMA = 6.0

Ngram = tuple[str, ...]


def caption_metrics(candidates: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Bleu_1 … Bleu_4, ROUGE_L and CIDEr of raw captions, keyed by image id, as `COCOEvalCap.eval` holds them.

    Raises ValueError if there is nothing to score; KeyError if a reference lacks its candidate.
    """
    hypotheses = [tokenize(candidates[key]) for key in references]
    ground_truth = [[tokenize(reference) for reference in references[key]] for key in references]
    scores = {f"Bleu_{n}": score for n, score in enumerate(bleu(hypotheses, ground_truth)[0], start=1)}
    return scores | {"ROUGE_L": rouge_l(hypotheses, ground_truth)[0], "CIDEr": cider(hypotheses, ground_truth)[0]}


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 … BLEU-4 (Papineni et al. 2002) with the closest reference length: of the set, and of each picture."""
    _check(candidates, references)
    correct_total, guessed_total, length_total, reference_total = [0] * LONGEST_NGRAM, [0] * LONGEST_NGRAM, 0, 0
    per_picture = []
    for candidate, refs in zip(candidates, references, strict=True):
        words = candidate.split()
        most: Counter[Ngram] = Counter()
        for reference in refs:
            most |= _ngrams(reference.split())
        correct = [0] * LONGEST_NGRAM
        for ngram, count in (_ngrams(words) & most).items():
            correct[len(ngram) - 1] += count
        guessed = [max(0, len(words) - n) for n in range(LONGEST_NGRAM)]
        closest = min((abs(len(ref.split()) - len(words)), len(ref.split())) for ref in refs)[1]
        per_picture.append(_bleu(correct, guessed, len(words), closest))
        correct_total = [a + b for a, b in zip(correct_total, correct, strict=True)]
        guessed_total = [a + b for a, b in zip(guessed_total, guessed, strict=True)]
        length_total += len(words)
        reference_total += closest
    return _bleu(correct_total, guessed_total, length_total, reference_total), per_picture


def _bleu(correct: Sequence[int], guessed: Sequence[int], length: int, reference_length: int) -> list[float]:
    product, scores = 1.0, []
    for n, (right, all_) in enumerate(zip(correct, guessed, strict=True), start=1):
        product *= (right + TINY) / (all_ + SMALL)
        scores.append(product ** (1 / n))
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [score * brevity for score in scores]


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """ROUGE-L (Lin 2004): F-score, β = 1.2, of the best precision and best recall of a longest common subsequence."""
    _check(candidates, references)
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        # A single blank splits: an empty caption is one empty word here, as in the original.
        words = candidate.split(" ")
        rows = [reference.split(" ") for reference in refs]
        common = [_longest_common_subsequence(words, row) for row in rows]
        precision = max(length / len(words) for length in common)
        recall = max(length / len(row) for length, row in zip(common, rows, strict=True))
        both = precision and recall
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if both else 0.0)
    return sum(scores) / len(scores), scores


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """CIDEr as coco-caption prints it: CIDEr-D (Vedantam et al. 2015, eq. 6), clipped counts, length penalty, × 10.

    Document frequencies come from the references given: a picture's score depends on its set, of one picture it is 0.
    """
    _check(candidates, references)
    counted = [[_ngrams(reference.split()) for reference in refs] for refs in references]
    frequency: Counter[Ngram] = Counter()
    for refs in counted:
        frequency.update({ngram for counts in refs for ngram in counts})
    log_pictures = math.log(len(candidates))
    rarity = {ngram: log_pictures - math.log(count) for ngram, count in frequency.items()}

    scores = []
    for candidate, refs in zip(candidates, counted, strict=True):
        hypothesis = _weigh(_ngrams(candidate.split()), rarity, log_pictures)
        total = sum(_similarity(hypothesis, _weigh(reference, rarity, log_pictures)) for reference in refs)
        scores.append(10 * total / LONGEST_NGRAM / len(refs))
    return sum(scores) / len(scores), scores


# Per n: n-gram -> weight; per n: norm; length.
_Weighed = tuple[list[dict[Ngram, float]], list[float], int]


def _weigh(counts: Counter[Ngram], rarity: Mapping[Ngram, float], unseen: float) -> _Weighed:
    vectors: list[dict[Ngram, float]] = [{} for _ in range(LONGEST_NGRAM)]
    length = 0
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * rarity.get(ngram, unseen)
        # The original measures length in bigrams.
        length += count if len(ngram) == 2 else 0
    return vectors, [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors], length


def _similarity(hypothesis: _Weighed, reference: _Weighed) -> float:
    penalty = math.exp(-((hypothesis[2] - reference[2]) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(
        hypothesis[0], reference[0], hypothesis[1], reference[1], strict=True
    ):
        shared = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
        norms = our_norm * their_norm
        total += shared / norms if norms else shared
    return total * penalty


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST_NGRAM + 1) for i in range(len(words) - n + 1))


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError(
            f"need one candidate and at least one reference a picture; got {len(candidates)} candidates, "
            f"{len(references)} sets of references, {sum(not refs for refs in references)} of them empty"
        )
