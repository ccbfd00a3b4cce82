"""Mends and judges the texts of a sample.

Knows what damage and junk look like in words, and which fields of a sample hold text. Knows nothing of images, shards, or
of what happens to a sample that is dropped; personal data are the business of `clean_private`.

The rules for documents are those of Gopher (Rae et al. 2021, https://arxiv.org/abs/2112.11446) and C4 (Raffel et al.
2020, https://arxiv.org/abs/1910.10683); for captions, which are a sentence long, they are looser where a sentence
repeats itself by nature.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import ftfy

from .clean_private import is_personal, masked
from .clean_rules import (
    Blocked,
    Documents,
    Language,
    Reason,
    Rules,
    language_identifier,
    read_word_list,
)

Kind = Literal["caption", "document", "question", "message"]

RUN = 5  # words in a row that count as said before (Gopher)
OFTEN = 4  # times from which a word may be too much of a text
PHRASE_SHARE = 0.2  # of the sentences; a document may mention a cookie policy once
NO_LANGUAGE = "zxx"  # ISO 639 for codes, numbers and the like
MANY_LINES = 4  # from which shares of lines mean something


# Words


# Scripts that put no space between words: kana, Han, Thai, Lao, Burmese, Khmer.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Vowel signs and accents belong to the word they stand in, and Python's \w has none of them.
_MARKS = "".join(char for char in map(chr, range(0x300, 0xFFFF)) if unicodedata.category(char).startswith("M"))
_WORD = re.compile(
    rf"[{_UNSPACED}][{_MARKS}]*|(?:[^\W{_UNSPACED}]|[{_MARKS}\u200c\u200d])+(?:['’](?:[^\W{_UNSPACED}]|[{_MARKS}])+)*"
)
_LETTERS = re.compile(rf"(?:[^\W\d_]|[{_MARKS}])+")


def words(text: str) -> list[str]:
    """The words of a text, caseless and in compatibility form; in scripts without spaces, each character is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


# Repair


# What is done is repair alone: curly quotes and full-width punctuation are how people write.
_REPAIRS = ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False)
# Soft hyphens, zero-width spaces, direction marks. Joiners stay: Persian, Hindi and emoji are spelt with them.
_INVISIBLE = re.compile("[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffc]")
_SPACES = re.compile(r"[^\S\n]+$|[^\S\n ]", re.MULTILINE)


def repaired(text: str, one_line: bool = False) -> str:
    """Undo mojibake, HTML entities, control and invisible characters and stray white space, by ftfy (Speer 2019).

    Lines and indentation stay, but in `one_line`. Repairing twice changes nothing more.
    """
    while True:
        mended = _SPACES.sub(_plain_space, _INVISIBLE.sub("", ftfy.fix_text(text, _REPAIRS)))
        mended = " ".join(mended.split()) if one_line else re.sub(r"\n{3,}", "\n\n", mended).strip()
        # What was taken away may have hidden more, such as an entity that it cut in two.
        if mended == text:
            return mended
        text = mended


def _plain_space(match: re.Match[str]) -> str:
    """Nothing at the end of a line; a tab as it is, for code and tables; any other space as the plain one."""
    space = match[0]
    if match.end() == len(match.string) or match.string[match.end()] == "\n":
        return ""
    return space if space == "\t" else " "


# Boilerplate and advertising


def _any_of(*phrases: str, anywhere: str = r"(?!)") -> re.Pattern[str]:
    """A pattern for lower-case text: the phrases where a word begins, `anywhere` within words too."""
    # One \b before them all, and no IGNORECASE, which would try every phrase at every letter: eight times faster.
    return re.compile(rf"\b(?:{'|'.join(phrases)})|{anywhere}")


BOILERPLATE = _any_of(
    r"click (?:here|on the (?:link|button|image|photo|picture)|to (?:enlarge|view|zoom|see|download|expand))\b",
    r"(?:cliquez ici|hier klicken|klicken sie hier|haga clic aquí|clicca qui|clique aqui|нажмите здесь)\b",
    r"lorem ipsum\b",
    r"(?:enable|activate|requires?|without|turn on) javascript\b|javascript (?:is|must be|has been) \w+abled\b",
    r"(?:site|page|we) uses? cookies\b|(?:accept|enable) (?:all )?cookies\b|cookies? (?:policy|settings|notice|consent)\b",
    r"(?:privacy policy|terms (?:of (?:use|service)|and conditions)|all rights reserved)\b",
    r"(?:image|photo|picture|preview|thumbnail) (?:is )?(?:not |un|no longer )(?:available|found)\b",
    r"no (?:image|photo|picture) (?:available|found|yet)\b|(?:image|photo) coming soon\b|image placeholder\b",
    r"stock (?:photo|image|vector|illustration|footage|photography)s?\b",
    r"(?:read|load|show|view) more\s*[»>→…]",
    r"skip to (?:main )?content\b|page not found\b|(?:sign|log) in to (?:view|continue|see)\b",
    r"subscribe to our\b|follow us on\b|share (?:this )?on (?:facebook|twitter)\b",
    anywhere=r"^\W*(?:read|load|show|view) more\W*$|点击(?:这里|此处)",
)
# What a caption or document may not hold, though a conversation may well be about it.
MARKUP = _any_of(
    r"href\s?=|javascript:\S",
    anywhere=r"</?(?:a|b|br|div|h\d|img|li|p|span|strong|t[dr]|ul)\b[^<>]*>|\{\{[^{}]*\}\}|\{%|%\w+_\w+%|\[object object\]",
)
ADVERTISING = _any_of(
    r"(?:buy|order|shop|book|call|subscribe|register|enquire|apply) now\b|(?:buy|order|call) today\b|buy\b.{1,60}\bonline\b",
    r"free (?:shipping|delivery|returns|trial)\b|(?:fast|worldwide) shipping\b|shipping (?:is )?(?:free|included)\b",
    r"\d{1,2}\s?% ?(?:off|discount)\b(?![- ](?:white|cent))|save (?:up to )?(?:[$€£]\s?\d|\d{1,2}\s?%)",
    r"add to (?:cart|basket|bag)\b|in stock\b(?! car)|out of stock\b|best (?:price|deal)s?\b|lowest prices?\b",
    r"(?:limited[- ]time offer|special offer|while (?:stocks|supplies) last|great deals?|clearance sale)\b",
    r"(?:only|from|price|now|was|rrp)[: ]\s?(?:[$€£¥]|usd|eur)\s?\d|(?:price|rrp): ?\d|money[- ]back guarantee\b",
    r"(?:jetzt kaufen|jetzt bestellen|versandkostenfrei|kostenloser versand|livraison gratuite|acheter maintenant)\b",
    r"(?:envío gratis|comprar ahora|compre agora|frete grátis|spedizione gratuita|acquista ora|gratis verzending)\b",
    r"(?:купить сейчас|бесплатная доставка)\b",
    anywhere="免费送货|立即购买|送料無料",
)
_NAMES = _any_of(
    r"(?:img|dsc[nf]?|pxl|mvi|gopr|sam|wp|screenshot)[-_ ]?\d{3,}\S*",
    anywhere=r"(?:https?://|www\.)\S+|(?<!\S)\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|pdf|mp4)\b",
)
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


def _says(pattern: re.Pattern[str], text: str) -> bool:
    """Whether the pattern is in at least a fifth of the sentences: once in a caption, all over in a document."""
    text = text.lower()
    if not pattern.search(text):
        return False
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    return sum(bool(pattern.search(sentence)) for sentence in sentences) >= PHRASE_SHARE * len(sentences)


def _is_only_a_name(text: str) -> bool:
    """Whether no two words are left once addresses and names of files are taken away, and there were some."""
    left, names = _NAMES.subn(" ", text.lower())
    return names > 0 and sum(any(map(str.isalpha, word)) for word in words(left)) < 2


# Faults


def fault(text: str, rules: Rules, kind: Kind = "caption") -> Reason | None:
    """The first reason to drop a repaired and masked text, or None.

    Of a question (or answer) and a message, only what may not be said in any text is judged: they may be short, a
    list, an address, or what a sign in the picture says.
    """
    if is_personal(text, rules.private):
        return Reason.PERSONAL
    said = words(text)
    if _is_blocked(said, rules.blocked):
        return Reason.BLOCKED
    if rules.text.boilerplate and _says(BOILERPLATE, text):
        return Reason.BOILERPLATE
    if kind in ("question", "message"):
        return None
    return _page_fault(text, rules) or _form_fault(text, said, rules, kind) or _language_fault(text, rules.language)


def _page_fault(text: str, rules: Rules) -> Reason | None:
    """What tells that a text is part of a page and not about a picture."""
    if rules.text.boilerplate and (_says(MARKUP, text) or _is_only_a_name(text)):
        return Reason.BOILERPLATE
    if rules.text.advertising and _says(ADVERTISING, text):
        return Reason.ADVERTISING
    return None


def _form_fault(text: str, said: Sequence[str], rules: Rules, kind: Kind) -> Reason | None:
    """What counting finds."""
    limits = rules.captions if kind == "caption" else rules.documents
    if len(said) < limits.min_words:
        return Reason.TOO_SHORT
    if len(said) > limits.max_words:
        return Reason.TOO_LONG
    if _letters(text) < rules.text.min_letters:
        return Reason.FEW_LETTERS
    symbols = text.count("#") + text.count("…") + text.count("...")
    if symbols > 1 and symbols > rules.text.max_symbols * len(said):
        return Reason.SYMBOLS
    if _top_word(said) > rules.text.max_top_word or _repeated(said) > limits.max_repeated:
        return Reason.REPETITION
    if isinstance(limits, Documents) and _are_broken(text.splitlines(), limits):
        return Reason.LIST
    return None


def _letters(text: str) -> float:
    """Share of letters, with the marks on them, in what is not white space; 1 for nothing."""
    written = len("".join(text.split()))
    return sum(map(len, _LETTERS.findall(text))) / written if written else 1.0


def _top_word(said: Sequence[str]) -> float:
    """Share of the letters in the word that fills most, of those said four times or more."""
    often = (len(word) * times for word, times in Counter(said).items() if times >= OFTEN)
    return max(often, default=0) / max(1, sum(map(len, said)))


def _repeated(said: Sequence[str]) -> float:
    """Share of the words that stand in a run of five said before."""
    seen: set[tuple[str, ...]] = set()
    covered, repeated = 0, 0  # words before `covered` are counted already
    for start in range(len(said) - RUN + 1):
        run = tuple(said[start : start + RUN])
        if run in seen:
            repeated += start + RUN - max(covered, start)
            covered = start + RUN
        seen.add(run)
    return repeated / max(1, len(said))


def _are_broken(lines: list[str], limits: Documents) -> bool:
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) < MANY_LINES:
        return False
    bullets = sum(line.startswith(("•", "-", "*", "‣", "▪", "●", "·", "–")) for line in lines)
    ellipses = sum(line.endswith(("…", "...")) for line in lines)
    same = len(lines) - len(set(lines))
    shares = ((bullets, limits.max_bullets), (ellipses, limits.max_ellipses), (same, limits.max_same_lines))
    return any(number > most * len(lines) for number, most in shares)


def _language_fault(text: str, language: Language) -> Reason | None:
    """By py3langid. Its probabilities say little of few words, so another language must be far likelier than ours."""
    if language.keep is None:
        return None
    letters = " ".join(word for word in text.split() if any(map(str.isalpha, word)))
    if sum(len(char.encode("utf-8", "replace")) for char in letters if char.isalpha()) < language.min_bytes:
        return None
    identifier = language_identifier()
    if identifier.classify(letters)[0] in language.keep:
        return None
    ranked = identifier.rank(letters)
    likeliest = max(probability for code, probability in ranked if code != NO_LANGUAGE)
    ours = max(probability for code, probability in ranked if code in language.keep)
    return Reason.LANGUAGE if likeliest > language.odds * ours else None


# Blocked words


def _is_blocked(said: Sequence[str], blocked: Blocked) -> bool:
    entries = _blocked_phrases(tuple(blocked.words), tuple(blocked.files))
    return bool(entries) and any(
        tuple(said[start : start + len(phrase)]) == phrase
        for start, word in enumerate(said)
        for phrase in entries.get(word, ())
    )


@lru_cache(maxsize=4)
def _blocked_phrases(entries: tuple[str, ...], files: tuple[str, ...]) -> dict[str, list[tuple[str, ...]]]:
    """First word -> the phrases that begin with it, so that a list of thousands costs one look-up a word."""
    phrases: dict[str, list[tuple[str, ...]]] = {}
    for entry in [*entries, *(entry for file in files for entry in read_word_list(file))]:
        phrase = tuple(words(entry))
        phrases.setdefault(phrase[0], []).append(phrase)
    return phrases


# A sample


def clean_fields(fields: Mapping[str, Any], rules: Rules) -> tuple[dict[str, Any], Reason | None]:
    """The JSON fields of a sample with their texts repaired and masked, and the first reason to drop it, or None.

    Texts are `caption(s)`, `text`, `question`, `answer(s)`, `qa` and the texts in `messages`; every other field, and what
    is no text where one should be, is kept as it is (`vlm.samples.parse_sample` names such a fault). An empty caption
    or text counts as none, unless it is all that the sample says.
    """
    reasons: list[Reason | None] = []
    said: list[bool] = []

    def cleaned(text: str, kind: Kind) -> str:
        mended = repaired(text, one_line=kind == "caption") if rules.text.repair else text
        mended = masked(mended, rules.private)
        said.append(bool(mended.strip()))
        if said[-1]:
            reasons.append(fault(mended, rules, kind))
        elif kind == "question":
            reasons.append(Reason.TOO_SHORT)
        return mended

    clean = {name: _cleaned_field(name, value, cleaned) for name, value in fields.items()}
    if said and not any(said):
        reasons.append(Reason.TOO_SHORT)
    return clean, next(filter(None, reasons), None)


Clean = Callable[[str, Kind], str]


def _cleaned_field(name: str, value: Any, clean: Clean) -> Any:
    match name, value:
        case "caption", str():
            return clean(value, "caption")
        case "text", str():
            return clean(value, "document")
        case (("question" | "answer"), str()):
            return clean(value, "question")
        case "captions", list():
            return [clean(caption, "caption") if isinstance(caption, str) else caption for caption in value]
        case "answers", list():
            return [_cleaned_answer(answer, clean) for answer in value]
        case "qa", list():
            return [_cleaned_question(entry, clean) for entry in value]
        case "messages", list():
            return [_cleaned_message(message, clean) for message in value]
    return value


def _cleaned_question(entry: Any, clean: Clean) -> Any:
    if not isinstance(entry, dict):
        return entry
    asked = ("question", "answer", "answers")
    return {name: _cleaned_field(name, value, clean) if name in asked else value for name, value in entry.items()}


def _cleaned_answer(answer: Any, clean: Clean) -> Any:
    """A plain answer, or an object of the official VQA files."""
    if isinstance(answer, dict) and isinstance(answer.get("answer"), str):
        return {**answer, "answer": clean(answer["answer"], "question")}
    return clean(answer, "question") if isinstance(answer, str) else answer


def _cleaned_message(message: Any, clean: Clean) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": clean(content, "message")}
    if isinstance(content, list):
        return {**message, "content": [_cleaned_part(part, clean) for part in content]}
    return message


def _cleaned_part(part: Any, clean: Clean) -> Any:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {**part, "text": clean(part["text"], "message")}
    return part
