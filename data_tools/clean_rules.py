"""What `vlm data clean` goes by: the rules a person may set, and the reasons for which a sample is left out.

Knows names, defaults, contradictions, and which languages can be told. Knows nothing of how a text, an image or a
duplicate is judged. Each field's description is its documentation; `vlm.settings.annotated_yaml(Rules())` prints it all.
"""

from __future__ import annotations

import os
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from py3langid.langid import MODEL_FILE, LanguageIdentifier
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vlm.errors import UsageError
from vlm.settings import COMMAND_LINE, Section, read_settings
from vlm.settings_faults import explain

from .dedup_image import MOST_DISTANCE

Treatment = Literal["mask", "drop", "keep"]


class Reason(StrEnum):
    """Why a sample is left out, in the words of the report, and `rule`: the key that decides it, "" where none does."""

    rule: str

    def __new__(cls, name: str, rule: str = "") -> Reason:
        member = str.__new__(cls, name)
        member._value_ = name
        member.rule = rule
        return member

    INVALID = "not a sample"
    PERSONAL = "personal data", "private"
    BLOCKED = "blocked word", "blocked"
    BOILERPLATE = "boilerplate", "text.boilerplate"
    ADVERTISING = "advertising", "text.advertising"
    TOO_SHORT = "too short", "captions.min_words"
    TOO_LONG = "too long", "captions.max_words"
    FEW_LETTERS = "few letters", "text.min_letters"
    SYMBOLS = "hashes and ellipses", "text.max_symbols"
    REPETITION = "repetition", "captions.max_repeated"
    LIST = "broken lines", "documents.max_bullets"
    LANGUAGE = "other language", "language.keep"
    UNREADABLE = "unreadable image"
    SMALL = "small image", "images.min_side"
    ASPECT = "long and narrow image", "images.max_aspect"
    UNIFORM = "blank image", "images.min_contrast"
    DUPLICATE = "duplicate", "duplicates.by"
    DISAGREEMENT = "image and text disagree", "agreement"
    CONTAMINATION = "in an evaluation set", "contamination"


@lru_cache(maxsize=1)
def language_identifier() -> LanguageIdentifier:
    """py3langid's model with probabilities, loaded once in a process (0.7 s). Its labels are the known languages."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _known_language(code: str) -> str:
    known = language_identifier().labels
    if code not in known:
        raise ValueError(f"{code!r} is no language that can be told; use ISO 639 codes: {', '.join(sorted(known))}")
    return code


def _blockable(entry: str) -> str:
    if not any(map(str.isalnum, entry)):
        raise ValueError(f"{entry!r} has no letter or digit, and whole words are compared; remove it")
    return entry


def _word_list(path: str) -> str:
    for entry in read_word_list(path):
        _blockable(entry)
    return path


def read_word_list(path: str) -> list[str]:
    """The entries of a file of blocked words: UTF-8, one word or phrase a line, after `#` a comment.

    Raises ValueError naming the file and the mend.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path} can not be read ({reason}); give a file with one word a line") from None
    return [entry for line in lines if (entry := line.partition("#")[0].strip())]


class Text(Section):
    """How texts are mended, and what captions and documents must be."""

    repair: bool = Field(True, description="mend mojibake, HTML entities, control characters, white space of any text")
    boilerplate: bool = Field(
        True, description="drop any text in which a page speaks of itself: click here, lorem ipsum, …"
    )
    advertising: bool = Field(
        True, description="drop captions and documents that sell: buy now, free shipping, 50% off"
    )
    min_letters: float = Field(0.3, ge=0, le=1, description="least share of letters in what is not white space; 0: any")
    max_symbols: NonNegativeFloat = Field(0.1, description="most # and … per word, the first is free (Gopher)")
    max_top_word: float = Field(
        0.5, gt=0, le=1, description="largest share of the letters in one word that comes four times or more; 1: any"
    )


class Language(Section):
    """Which languages captions and documents may be in."""

    keep: list[Annotated[str, AfterValidator(_known_language)]] | None = Field(
        None, min_length=1, description="ISO 639 codes, e.g. [en, de]; null: all"
    )
    odds: float = Field(
        100.0, gt=1, description="dropped when another language is this many times likelier than each of these"
    )
    min_bytes: PositiveInt = Field(
        20, description="bytes of letters from which a text is judged: a Latin clause, seven Chinese characters"
    )


class Captions(Section):
    """Lengths of captions. A Chinese, Japanese, Thai, Lao, Khmer or Burmese character counts as a word."""

    min_words: NonNegativeInt = Field(2, description="fewest words")
    max_words: PositiveInt = Field(256, description="most words")
    max_repeated: float = Field(
        0.5, ge=0, le=1, description="largest share of words in runs of five that were said before; 1: any"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Captions:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}; swap them")
        return self


class Documents(Captions):
    """Lengths and lines of the plain texts."""

    max_words: PositiveInt = Field(100_000, description="most words (Gopher)")
    max_bullets: float = Field(0.9, ge=0, le=1, description="largest share of lines that open with a bullet (Gopher)")
    max_ellipses: float = Field(0.3, ge=0, le=1, description="largest share of lines that end in an ellipsis (Gopher)")
    max_same_lines: float = Field(0.3, ge=0, le=1, description="largest share of lines that stand above too (Gopher)")


class Private(Section):
    """Personal data in any text: mask writes [email], [phone], [card], [ip] in its place, drop leaves the sample out."""

    emails: Treatment = Field("mask", description="e-mail addresses: mask, drop or keep")
    phones: Treatment = Field("mask", description="phone numbers: mask, drop or keep")
    cards: Treatment = Field("mask", description="numbers of payment cards whose check digit is right")
    ips: Treatment = Field("keep", description="IP addresses; four-part version numbers look like them")


class Blocked(Section):
    """Words and phrases that no text may hold: whole words, upper or lower case, in any script."""

    words: list[Annotated[str, AfterValidator(_blockable)]] = Field([], description="words and phrases")
    files: list[Annotated[str, AfterValidator(_word_list)]] = Field(
        [], description="text files of them: one a line, after # a comment"
    )


class Images(Section):
    """What every picture must be, once it opens."""

    min_side: NonNegativeInt = Field(32, description="fewest pixels of the shorter side")
    max_aspect: float = Field(5.0, ge=1, description="longer side / shorter side at most")
    min_contrast: NonNegativeFloat = Field(
        2.0, description="spread of 8-bit levels, shrunk to 32×32 pixels, below which a picture is blank; 0: any"
    )


class Duplicates(Section):
    """When two samples are the same; of those the first stays."""

    by: Literal["pair", "image", "text", "none"] = Field(
        "pair", description="what must be the same: image and text, image, text; none: nothing is dropped"
    )
    jaccard: float = Field(
        0.8, ge=0.5, le=1, description="texts this similar are the same (MinHash); 1: equal ones only"
    )
    distance: NonNegativeInt = Field(
        4,
        le=MOST_DISTANCE,
        description="images whose perceptual hashes differ in at most so many of 64 bits are the same",
    )


class Agreement(Section):
    """How well image and text fit, as a trained contrastive model sees it (DataComp, Gadre et al. 2023)."""

    model: str | None = Field(
        None, description="folder of the model, which reads of a long text as much as it takes; null: not judged"
    )
    drop_lowest: float | None = Field(None, gt=0, lt=1, description="share of the samples to drop; this or threshold")
    threshold: float | None = Field(None, ge=-1, le=1, description="cosine below which a sample is dropped")

    @model_validator(mode="after")
    def _one_measure(self) -> Agreement:
        if self.drop_lowest is not None and self.threshold is not None:
            raise ValueError(
                f"drop_lowest {self.drop_lowest:g} and threshold {self.threshold:g} are both set; remove one"
            )
        measured = self.drop_lowest is not None or self.threshold is not None
        if self.model is None and measured:
            raise ValueError("model is missing; give the folder of a trained model, or remove drop_lowest or threshold")
        if self.model is not None and not measured:
            raise ValueError(
                f"model {self.model} is set without drop_lowest or threshold; add one, e.g. drop_lowest: 0.1"
            )
        return self


class Rules(Section):
    """All rules. The defaults keep every ordinary caption."""

    text: Text = Field(Text(), description="how texts are mended, and what captions and documents must be")
    language: Language = Field(Language(), description="which languages captions and documents may be in")
    captions: Captions = Field(
        Captions(), description="their lengths; a Chinese, Japanese or Thai character counts as a word"
    )
    documents: Documents = Field(Documents(), description="lengths and lines of the plain texts")
    private: Private = Field(Private(), description="personal data in any text: mask, drop or keep")
    blocked: Blocked = Field(Blocked(), description="words that no text may hold: whole words in any case and script")
    images: Images = Field(Images(), description="what every picture must be")
    duplicates: Duplicates = Field(Duplicates(), description="when two samples are the same; the first stays")
    agreement: Agreement = Field(Agreement(), description="whether image and text fit, as your own model sees it")
    contamination: list[str] = Field([], description="shards of evaluation sets; what is too close to them is dropped")


def load_rules(path: str | Path | None = None, overrides: list[str] | None = None) -> Rules:
    """The rules of a YAML file, or the defaults, with `key.sub=value` overrides.

    Raises UsageError that names the key and the line for an unknown key, a wrong type or a contradiction.
    """
    settings = read_settings(Path(path or os.devnull), overrides or [], {})
    if path is None:
        settings.marks[()] = COMMAND_LINE
    try:
        return Rules.model_validate(settings.values)
    except ValidationError as error:
        raise UsageError(explain(error, settings, Rules)) from None
