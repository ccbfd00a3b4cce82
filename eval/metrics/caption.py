"""BLEU, ROUGE-L and CIDEr of captions as coco-caption computes them. Knows tokens and formulas; nothing of files.

Every function takes captions as `tokenizer.tokenize` leaves them (lower-cased tokens joined by single spaces), one
candidate and at least one reference a picture, and returns the score of the whole set and the score of each picture.
Held to github.com/tylin/coco-caption (`pycocoevalcap` 1.2), quirks included. What that prints as `CIDEr`, and papers
report as it, is CIDEr-D with σ = 6: clipped, with a penalty on length. So it is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from .ngrams import Ngrams, Table
from .tokenizer import tokenize_all

LONGEST_NGRAM = 4
# BLEU: keeps 0/0 at 0 and n/0 finite.
TINY, SMALL = 1e-15, 1e-9
# ROUGE-L: how much more recall weighs than precision.
BETA = 1.2
# CIDEr-D: width of the Gaussian penalty on a difference in length.
SIGMA = 6.0
CIDER_NAME = "CIDEr-D, sigma 6, document frequencies of the references given"


class CaptionSet:
    """Candidates and references of a set of pictures, tokenized, with the n-grams that its metrics share.

    Pictures are numbered 0 … P-1 in the order given, references 0 … R-1 in the order of their pictures.
    Raises ValueError unless there is one candidate and at least one reference a picture.
    """

    def __init__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        if not candidates or len(candidates) != len(references) or not all(references):
            raise ValueError(
                f"need one candidate and at least one reference a picture; got {len(candidates)} candidates, "
                f"{len(references)} sets of references, {sum(not refs for refs in references)} of them empty"
            )
        self.candidates, self.references = candidates, references
        self.pictures = len(candidates)
        self.picture_of = np.repeat(np.arange(self.pictures), [len(refs) for refs in references])  # (R,)

    @cached_property
    def ngrams(self) -> Ngrams:
        """Counts of the n-grams of all captions: the candidates first, then the references."""
        return Ngrams([*self.candidates, *(reference for refs in self.references for reference in refs)])

    def split(self, n: int) -> tuple[Table, Table]:
        """Counts of n-grams in candidates, whose `text` is the picture, and in references, whose `text` is 0 … R-1."""
        return self.ngrams.table(n).split(self.pictures)


def caption_metrics(candidates: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Bleu_1 … Bleu_4, ROUGE_L and CIDEr of raw captions, keyed by image id, as `COCOEvalCap.eval` holds them.

    Raises ValueError if there is nothing to score; KeyError if a reference lacks its candidate.
    """
    return {name: score for name, (score, _) in caption_scores(tokenized(candidates, references)).items()}


def tokenized(candidates: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> CaptionSet:
    """Raw captions as a `CaptionSet`, in the order of `references`. Errors as in `caption_metrics`."""
    hypotheses = tokenize_all([candidates[key] for key in references])
    tokens = iter(tokenize_all([reference for refs in references.values() for reference in refs]))
    return CaptionSet(hypotheses, [[next(tokens) for _ in refs] for refs in references.values()])


def caption_scores(captions: CaptionSet) -> dict[str, tuple[float, list[float]]]:
    """Metric -> score of the set and of each picture, named as coco-caption names them."""
    of_set, of_each = bleu_of(captions)
    scores = {f"Bleu_{n + 1}": (of_set[n], [each[n] for each in of_each]) for n in range(LONGEST_NGRAM)}
    return scores | {"ROUGE_L": rouge_l(captions.candidates, captions.references), "CIDEr": cider_of(captions)}


# ------------------------------------------------------------------------------------------------------------ BLEU


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 … BLEU-4 (Papineni et al. 2002) with the closest reference length: of the set, and of each picture."""
    return bleu_of(CaptionSet(candidates, references))


def bleu_of(captions: CaptionSet) -> tuple[list[float], list[list[float]]]:
    """`bleu` of a `CaptionSet`."""
    statistics = bleu_statistics(captions)
    return bleu_from(statistics.sum(axis=0)).tolist(), bleu_from(statistics).tolist()


def bleu_statistics(captions: CaptionSet) -> np.ndarray:
    """(P, 10) counts that add up over pictures: right n-grams (4), n-grams (4), words, words of the closest reference."""
    rows = np.zeros((captions.pictures, 2 * LONGEST_NGRAM + 2))
    lengths, reference_lengths = np.split(captions.ngrams.lengths, [captions.pictures])
    for n in range(1, LONGEST_NGRAM + 1):
        candidates, references = captions.split(n)
        most = references.relabelled(captions.picture_of).maximum()
        clipped = np.minimum(candidates.count, most.lookup(candidates))
        rows[:, n - 1] = np.bincount(candidates.text, clipped, captions.pictures)
        rows[:, LONGEST_NGRAM + n - 1] = np.maximum(0, lengths - n + 1)
    # By difference to the candidate, then by length; the first of each picture is the closest.
    order = np.lexsort((reference_lengths, abs(reference_lengths - lengths[captions.picture_of]), captions.picture_of))
    first = np.searchsorted(captions.picture_of, np.arange(captions.pictures))
    rows[:, -2], rows[:, -1] = lengths, reference_lengths[order][first]
    return rows


def bleu_from(statistics: np.ndarray) -> np.ndarray:
    """BLEU-1 … BLEU-4, (…, 4), of sums of `bleu_statistics` (…, 10)."""
    right, all_ = statistics[..., :LONGEST_NGRAM], statistics[..., LONGEST_NGRAM : 2 * LONGEST_NGRAM]
    length, reference_length = statistics[..., -2:-1], statistics[..., -1:]
    product = np.cumprod((right + TINY) / (all_ + SMALL), axis=-1)
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return product ** (1 / np.arange(1, LONGEST_NGRAM + 1)) * brevity


# --------------------------------------------------------------------------------------------------------- ROUGE-L


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """ROUGE-L (Lin 2004): F-score, β = 1.2, of the best precision and best recall of a longest common subsequence."""
    CaptionSet(candidates, references)
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        # A single blank splits: an empty caption is one empty word here, as in the original.
        words = candidate.split(" ")
        rows = [reference.split(" ") for reference in refs]
        common = _longest_common_subsequences(words, rows)
        precision = max(common) / len(words)
        recall = max(length / len(row) for length, row in zip(common, rows, strict=True))
        both = precision and recall
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if both else 0.0)
    return sum(scores) / len(scores), scores


def _longest_common_subsequences(words: Sequence[str], others: Sequence[Sequence[str]]) -> list[int]:
    """Lengths of the longest common subsequences of `words` with each of `others`, all places of `words` at once.

    Bit i of `row` is 0 where the subsequence grows at word i (Hyyrö 2004, "Bit-parallel LCS-length computation
    revisited").
    """
    places: dict[str, int] = {}
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(words)) - 1
    lengths = []
    for other in others:
        row = full
        for word in other:
            matches = row & places.get(word, 0)
            row = ((row + matches) | (row - matches)) & full
        lengths.append(len(words) - row.bit_count())
    return lengths


# ----------------------------------------------------------------------------------------------------------- CIDEr


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """CIDEr as coco-caption prints it: CIDEr-D (Vedantam et al. 2015, eq. 6), clipped counts, length penalty, × 10.

    Document frequencies come from the references given: a picture's score depends on its set, of one picture it is 0.
    """
    return cider_of(CaptionSet(candidates, references))


def cider_of(captions: CaptionSet) -> tuple[float, list[float]]:
    """`cider` of a `CaptionSet`."""
    similarity = sum(_similarities(captions, n) for n in range(1, LONGEST_NGRAM + 1)) / LONGEST_NGRAM
    # The original measures length in bigrams.
    bigrams, reference_bigrams = np.split(np.maximum(0, captions.ngrams.lengths - 1), [captions.pictures])
    apart = bigrams[captions.picture_of] - reference_bigrams
    weighed = 10 * similarity * np.exp(-(apart**2) / (2 * SIGMA**2))
    references = np.bincount(captions.picture_of, minlength=captions.pictures)
    scores = np.bincount(captions.picture_of, weighed, captions.pictures) / references
    return float(scores.mean()), scores.tolist()


def _similarities(captions: CaptionSet, n: int) -> np.ndarray:
    """(R,) clipped cosines of each reference with its picture's candidate over the tf-idf weights of their n-grams."""
    candidates, references = captions.split(n)
    seen = np.bincount(references.relabelled(captions.picture_of).maximum().gram, minlength=references.grams)
    rarity = np.log(captions.pictures) - np.log(np.maximum(1, seen))
    ours, theirs = candidates.weighed(rarity), references.weighed(rarity)
    matching = ours.lookup(theirs.relabelled(captions.picture_of))
    shared = np.bincount(theirs.text, np.minimum(matching, theirs.count) * theirs.count, len(captions.picture_of))
    norms = ours.norms(captions.pictures)[captions.picture_of] * theirs.norms(len(captions.picture_of))
    return shared / np.where(norms > 0, norms, 1.0)
