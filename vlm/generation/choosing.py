"""The next token of every row of a batch, each by its own settings and its own random numbers.

Knows logits and `Decoding`. Knows nothing of models, text or rows' histories beyond the tokens that a penalty is about.
What a row gets does not depend on the rows beside it.

Shapes: B rows, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decoding import Decoding


@dataclass
class Chooser:
    """How one row chooses: settings, and the random numbers that are its alone."""

    decoding: Decoding
    random: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        seed = self.decoding.seed
        # Without a seed it follows from the global random state, as everything in PyTorch does.
        self.random.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def choose(logits: Tensor, choosers: Sequence[Chooser], said: Sequence[Sequence[int]]) -> tuple[list[int], list[float]]:
    """Logits (B, V) -> the next token of each row, and its log-probability (natural, before temperature and cuts).

    said: the tokens of each row so far, prompt included, for the repetition penalty.
    """
    logits = logits.float()
    penalised = [row for row, chooser in enumerate(choosers) if chooser.decoding.repetition_penalty != 1.0]
    if penalised:
        logits = logits.clone()
    for row in penalised:
        logits[row] = penalise(logits[row], said[row], choosers[row].decoding.repetition_penalty)
    tokens = logits.argmax(dim=-1)
    for rows in _alike(choosers):
        tokens[rows] = _sample(logits[rows], [choosers[row] for row in rows])
    told = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return tokens.tolist(), told.tolist()


def continuations(
    logits: Tensor,
    totals: Sequence[float],
    said: Sequence[Sequence[int]],
    *,
    penalty: float,
    never: int | None,
    count: int,
) -> list[tuple[float, int, int]]:
    """The `count` likeliest ways for rows of logits (B, V) to go on, of all rows together, the likeliest first.

    totals: the log-probability of each row so far. Each way is (log-probability with its word, row, word). Words that were
    `said` are penalised as log-probabilities and the word `never` is left out after that, both as in the beam search of
    Hugging Face's `generate`.
    """
    told = logits.float().log_softmax(dim=-1)
    if penalty != 1.0:
        told = torch.stack([penalise(row, words, penalty) for row, words in zip(told, said, strict=True)])
    if never is not None:
        told[:, never] = -torch.inf
    sums = (told + torch.tensor(totals, dtype=told.dtype, device=told.device)[:, None]).flatten()  # (B · V,)
    best, places = sums.topk(min(count, len(sums)))
    ways = zip(best.tolist(), places.tolist(), strict=True)
    return [(total, *divmod(place, logits.shape[1])) for total, place in ways if total != -torch.inf]


def penalise(logits: Tensor, said: Sequence[int], penalty: float) -> Tensor:
    """Logits or log-probabilities (V,), those of words already said divided by `penalty`, or multiplied where negative (CTRL,
    Keskar et al. 2019, section 4.1)."""
    words = torch.tensor(sorted(set(said)), device=logits.device)
    scores = logits[words]
    return logits.index_copy(0, words, torch.where(scores < 0, scores * penalty, scores / penalty))


def likelihoods(logits: Tensor, decodings: Sequence[Decoding]) -> tuple[Tensor, Tensor]:
    """Logits (B, V) -> the words that may be said, (B, W), and the probability of each, 0 where it is cut.

    Temperature, then the k likeliest, then the fewest that hold p of what is left (Holtzman et al. 2020), then those with at
    least min_p of the likeliest one's probability (Nguyen et al. 2024): the order of Hugging Face's `generate`.
    """
    device = logits.device
    scores = logits / torch.tensor([one.temperature for one in decodings], device=device)[:, None]
    width = max(min(one.top_k or scores.shape[1], scores.shape[1]) for one in decodings)
    if any(one.top_k or one.top_p for one in decodings):
        scores, words = scores.topk(width, dim=-1)
    else:
        words = torch.arange(width, device=device).expand(len(scores), -1)
    ranks = torch.arange(width, device=device)
    most = torch.tensor([one.top_k or width for one in decodings], device=device)[:, None]
    probabilities = scores.masked_fill(ranks >= most, -torch.inf).softmax(dim=-1)
    share = torch.tensor([one.top_p or 1.0 for one in decodings], device=device)[:, None]
    if bool((share < 1).any()):
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= share, 0.0)
    least = torch.tensor([one.min_p or 0.0 for one in decodings], device=device)[:, None]
    floor = least * probabilities.amax(dim=-1, keepdim=True)
    return words, probabilities.masked_fill(probabilities < floor, 0.0)


def _sample(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """(B, V) -> (B,): one random number a row, looked up in the cumulated probabilities."""
    words, probabilities = likelihoods(logits, [chooser.decoding for chooser in choosers])
    cumulated = probabilities.double().cumsum(dim=-1)
    drawn = torch.tensor([torch.rand((), generator=chooser.random, dtype=torch.float64) for chooser in choosers])
    sought = drawn.to(cumulated)[:, None] * cumulated[:, -1:]
    # The first place whose sum is above what was drawn: never a word of probability 0.
    place = torch.searchsorted(cumulated, sought, right=True).clamp(max=words.shape[1] - 1)
    return words.gather(1, place)[:, 0]


def _alike(choosers: Sequence[Chooser]) -> list[list[int]]:
    """Rows that sample, in groups whose words are sorted alike, so that a row's luck is the same in any company."""
    groups: dict[str, list[int]] = {}
    for row, chooser in enumerate(choosers):
        decoding = chooser.decoding
        if decoding.temperature > 0:
            kind = "k" if decoding.top_k else "p" if decoding.top_p else "all"
            groups.setdefault(kind, []).append(row)
    return list(groups.values())
