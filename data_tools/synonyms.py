"""Words of an English text in the place of others that say the same, where the sentence leaves no doubt which are meant.

Knows a table of synonyms, WordNet where its data are installed, the words around that tell a noun from a verb, and
spelling. Knows nothing of samples, shards or pictures.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from random import Random
from typing import Any, Protocol

from vlm.wording import is_negation, negated, said_by, words

_DETERMINERS = frozenset(
    "a an the this that these those his her its their my our your some what which whose another".split()
)
_JOINING = frozenset("and or of with on in at by near from to for into onto over under behind beside as like".split())
_AUXILIARIES = frozenset(
    "is are was were be been has have had do does did can will that who which while where when if".split()
)
_AFTER_NOUN = _JOINING | _AUXILIARIES | frozenset("it they there here next up down out off along across".split())
_AFTER_PARTICIPLE = (
    _DETERMINERS | _JOINING | frozenset("up down out off along across around through away together".split())
)
_COPULAS = frozenset("is are was were be looks look seems seem very".split())
_OPENING = _DETERMINERS | _JOINING
_CLOSED_CLASS = _DETERMINERS | _AFTER_NOUN | _COPULAS
_IRREGULAR = {"man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth"}
_COMPOUND = re.compile(r"(man|woman|child|person)$")
_PLURAL_ONLY = frozenset("trousers slacks jeans pants pajamas pyjamas glasses people police".split())
_CONSONANT_VOWELS = re.compile(r"(?:uni(?![ndm])|use|usu|eur|one|ewe|uk)")
_SILENT = re.compile(r"(?:hour|hono|heir|honest)")


@dataclass(frozen=True)
class Entry:
    """What may take the place of a word form, and the part of speech in which it may: noun, adjective or participle."""

    part: str
    replacements: tuple[str, ...]


class Thesaurus(Protocol):
    """Where synonyms come from."""

    def entry(self, word: str) -> Entry | None:
        """The entry of a word form in lower case; None where there is none, or more than one that could be meant."""


class Table:
    """The package's own synonyms, `synonyms.tsv`, plurals included."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        for line in resources.files(__package__).joinpath("synonyms.tsv").read_text("utf-8").splitlines():
            if not line.startswith("#"):
                part, _, listed = line.partition("\t")
                giving, _, taking = listed.partition(" > ")
                self._add(part, giving.split(), (taking or giving).split())

    def _add(self, part: str, giving: Sequence[str], taking: Sequence[str]) -> None:
        for word in giving:
            others = tuple(other for other in taking if other != word)
            self._entries[word.lower()] = Entry(part, others)
            if part == "noun" and word not in _PLURAL_ONLY:
                self._entries[plural(word).lower()] = Entry(part, tuple(map(plural, others)))

    def entry(self, word: str) -> Entry | None:
        """As `Thesaurus.entry`."""
        return self._entries.get(word)

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return iter(self._entries.items())


class WordNet:
    """Synonyms of WordNet (Miller 1995), by nltk: only of words in their dictionary form that have a single meaning, and
    only words that are in use, by WordNet's own counts in tagged text.

    corpus: one like `nltk.corpus.wordnet`, which is the default. Raises ImportError or LookupError where nltk or its data
    are not installed.
    """

    PARTS = {"n": "noun", "a": "adjective", "s": "adjective"}

    def __init__(self, corpus: Any = None) -> None:
        self._corpus = corpus or importlib.import_module("nltk.corpus").wordnet
        # Its data are looked for at the first question, not before.
        self._corpus.synsets("dog")

    def entry(self, word: str) -> Entry | None:
        """As `Thesaurus.entry`."""
        meanings = self._corpus.synsets(word)
        if len(meanings) != 1 or meanings[0].pos() not in self.PARTS:
            return None
        lemmas = meanings[0].lemmas()
        if word not in (lemma.name() for lemma in lemmas):
            return None
        usual = tuple(lemma.name() for lemma in lemmas if lemma.name() != word and self._is_usual(lemma, meanings[0]))
        return Entry(self.PARTS[meanings[0].pos()], usual) if usual else None

    def _is_usual(self, lemma: Any, meaning: Any) -> bool:
        """Whether a word is one plain word in use whose first meaning this is."""
        name = lemma.name()
        return name.isalpha() and name.islower() and lemma.count() > 0 and self._corpus.synsets(name)[0] == meaning


def wordnet_is_installed() -> bool:
    """Whether nltk is there and finds the data of WordNet."""
    try:
        WordNet()
    except (ImportError, LookupError):
        return False
    return True


@lru_cache(maxsize=2)
def thesauri(with_wordnet: bool) -> tuple[Thesaurus, ...]:
    """The table, and WordNet after it where asked for; raises what `WordNet` does."""
    return (Table(), WordNet()) if with_wordnet else (Table(),)


def replace_words(
    text: str, sources: Sequence[Thesaurus], rng: Random, share: float, keep: frozenset[str] = frozenset()
) -> str:
    """The text with at most `share` of its words replaced by synonyms, drawn by `rng`; as it was where none can be.

    A word is replaced where the words around it allow the part of speech of its only entry, alike everywhere in the text,
    and never: in the scope of a negation; if it is in `keep` (in lower case) or the same but for its plural; with a capital
    inside a sentence, which makes a name of it; if it says what the other does not, see `vlm.wording.said_by`; by a word
    that the text has already. Capitals and plurals stay, `a` and `an` follow.
    """
    found = [match[0] for match in words(text)]
    replacements = _replaceable(text, sources, keep)
    left = int(share * len(found))
    chosen: dict[str, str] = {}
    for word in rng.sample(sorted(replacements), len(replacements)):
        times = sum(one.lower() == word for one in found)
        options = [other for other in replacements[word] if other.lower() not in map(str.lower, chosen.values())]
        if options and times <= left:
            chosen[word] = rng.choice(options)
            left -= times
    return _written(text, chosen)


def _replaceable(text: str, sources: Sequence[Thesaurus], keep: frozenset[str]) -> dict[str, list[str]]:
    """The words, in lower case, that may be replaced wherever they stand in the text, and by what."""
    matches = words(text)
    lower = [match[0].lower() for match in matches]
    present = set(lower) | set(map(plural, lower))
    kept = keep | set(map(plural, keep))
    allowed: dict[str, list[str]] = {}
    refused: set[str] = set()
    for index, (word, denied) in enumerate(zip(lower, negated(text), strict=True)):
        entry = None if word in kept or plural(word) in kept else _entry(word, sources)
        named = _is_name(text, matches[index])
        if entry is None or denied or named or not _fits(entry.part, text, matches, index):
            refused.add(word)
            continue
        options = [other for other in entry.replacements if said_by(other) == said_by(word)]
        allowed[word] = [
            other for other in options if other.lower() not in present and plural(other.lower()) not in present
        ]
    return {word: options for word, options in allowed.items() if options and word not in refused}


def _entry(word: str, sources: Sequence[Thesaurus]) -> Entry | None:
    return next((entry for source in sources if (entry := source.entry(word)) is not None), None)


def _is_name(text: str, match: re.Match[str]) -> bool:
    """Whether a word has a capital that neither begins its sentence nor is the manner of the whole text."""
    word = match[0]
    if word.islower() or text.isupper():
        return False
    return word[1:] != word[1:].lower() or not re.search(r"(?:^|[.!?:\n])[\"'“‘(\s]*$", text[: match.start()])


def _fits(part: str, text: str, matches: Sequence[re.Match[str]], index: int) -> bool:
    """Whether the words around allow the part of speech; where they leave a doubt they do not.

    A word with a hyphen beside it is part of another.
    """
    start, end = matches[index].span()
    if "-" in text[max(0, start - 1) : start] + text[end : end + 1]:
        return False
    before = "" if index == 0 or _parted(text, matches[index - 1].end(), start) else matches[index - 1][0].lower()
    last = index + 1 == len(matches) or _parted(text, end, matches[index + 1].start())
    return _FITS[part](before, "" if last else matches[index + 1][0].lower())


def _parted(text: str, first: int, last: int) -> bool:
    return not text[first:last].isspace()


def _opens_phrase(before: str) -> bool:
    """Whether a noun, with or without adjectives, may follow."""
    return not before or before in _OPENING or before in _adjectives() or bool(said_by(before))


def _noun_fits(before: str, after: str) -> bool:
    """Behind what a noun follows or a verb in -ing; before nothing that it could be a compound with."""
    opened = _opens_phrase(before) or before.endswith("ing")
    closed = not after or after in _AFTER_NOUN or is_negation(after) or after.endswith("ing")
    return opened and closed


def _adjective_fits(before: str, after: str) -> bool:
    """Between a determiner, joining word or other adjective and a word with content, or behind `is` with no word after."""
    if after and after not in _CLOSED_CLASS:
        return _opens_phrase(before)
    return before in _COPULAS and (not after or after in _JOINING)


def _participle_fits(before: str, after: str) -> bool:
    """Behind a word it can be said of, before an object with its determiner, a preposition or nothing."""
    return before != "" and before not in _OPENING and (not after or after in _AFTER_PARTICIPLE or bool(said_by(after)))


_FITS = {"noun": _noun_fits, "adjective": _adjective_fits, "participle": _participle_fits}


@lru_cache(maxsize=1)
def _adjectives() -> frozenset[str]:
    plain = (
        "old young new wet cold hot happy sad cute busy dirty clean fresh hungry fluffy wild lone open closed".split()
    )
    return frozenset(plain) | {word for word, entry in Table() if entry.part == "adjective"}


def _written(text: str, chosen: Mapping[str, str]) -> str:
    """The text with the chosen words in it, their capitals and articles put right."""
    matches = words(text)
    pieces, read = [], 0
    for index, match in enumerate(matches):
        word = match[0]
        after = chosen.get(matches[index + 1][0].lower()) if index + 1 < len(matches) else None
        if word.lower() in chosen:
            other = chosen[word.lower()]
            word = other.upper() if text.isupper() else _capital(word, other)
        elif word.lower() in ("a", "an") and after and text[match.end() : matches[index + 1].start()].isspace():
            word = _capital(word, article(after))
        pieces += [text[read : match.start()], word]
        read = match.end()
    return "".join(pieces) + text[read:]


def _capital(word: str, other: str) -> str:
    """`other` with a first capital where `word` has one."""
    return other[0].upper() + other[1:] if word[0].isupper() else other


def article(word: str) -> str:
    """`a` or `an`, by the sound that a word begins with."""
    lower = word.lower()
    vowel = lower[0] in "aeiou" and not _CONSONANT_VOWELS.match(lower)
    return "an" if vowel or _SILENT.match(lower) else "a"


@lru_cache(maxsize=1 << 16)
def plural(noun: str) -> str:
    """The plural of an English noun in the singular; of another word something that no text has."""
    if noun in _PLURAL_ONLY:
        return noun
    if found := _COMPOUND.search(noun):
        return noun[: found.start()] + _IRREGULAR[found[0]]
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search(r"(?:s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"
