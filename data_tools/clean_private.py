"""Finds and masks personal data in a text: e-mail addresses, phone and card numbers, IP addresses.

Knows how they are written, and what looks like them and is not. Knows nothing of samples or of other faults of a text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from .clean_rules import Private

MASKS = {"emails": "[email]", "cards": "[card]", "ips": "[ip]", "phones": "[phone]"}

_AT = r"(?:[@＠]|\s?[\[(]\s?at\s?[\])]\s?)"
_DOT = r"(?:\.|\s?[\[(]\s?dot\s?[\])]\s?)"
# What may stand before a digit within a number, and a digit or a few in brackets.
_GAP = r"[ \u00a0\u2010\u2011.\-/]{0,2}"
_NEXT = rf"(?:{_GAP}\d|{_GAP}\(\d{{1,4}}\))"
# Of two numbers side by side, the first may take the beginning of the second; then it takes the rest.
_REST = r"(?<=\d)(?!\d)(?:(?:[ .\-/]{1,2}\d{4,}|[.\-/]\d+)(?:[ .\-/]{1,2}\d+)*)?"
_BEFORE = r"(?<!\d)(?<!\d[.,:/-])"
_ZERO, _DIGIT = "[0٠۰०]", "[^\\D0٠۰०]"  # Latin, Arabic, Persian, Hindi; and any digit but these
_NO_DATE = r"(?!\d{1,2}[./-]\d{1,2}[./-](?:(?:19|20)\d\d(?!\d)|\d\d(?!\d|[./-]\d)))(?!(?:19|20)\d\d[-./]\d{1,2}[-./]\d{1,2}(?!\d))"
_ANNOUNCED = (
    r"\b(?:(?:tel|tél|telephone|telefon|teléfono|telefono|téléphone|fax|whatsapp|hotline|тел|телефон|电话|電話)\b"
    r"|(?:phone|mobile|mob|cell|call|text|sms)(?=[.:]| us| at| on| no\b| number| \(?\d{3}[-.) ]{1,2}\d{3,4}\b))"
    r"(?:\s?(?:us|at|on|no|number|or)\b)*[.:：]?\s{0,2}"
)

EMAIL = re.compile(
    rf"(?<![\w.+-])[\w.+-]++{_AT}[\w-]++(?:{_DOT}[\w-]+)*{_DOT}(?!(?:png|jpe?g|gif|webp|svg)\b)[^\W\d_]{{2,}}(?![\w-])",
    re.IGNORECASE,
)
CARD = re.compile(r"(?<![\d.])(?:[3-6]\d{3}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([ -]?)\d{6}\2\d{5})(?!\d)")
IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){3,7}(?![\w:]))", re.IGNORECASE
)
PHONE = re.compile(
    rf"{_ANNOUNCED}(?P<announced>{_NO_DATE}\(?\+?\d\)?{_NEXT}{{5,14}}{_REST})"
    rf"|{_BEFORE}(?:1[-. ])?(?:\(\d{{3}}\) ?|\d{{3}}[-. ])\d{{3}}[-. ]\d{{4}}(?!\d)"  # (555) 123-4567
    rf"|{_BEFORE}{_ZERO}\d(?:[ .-]\d\d){{4}}(?!\d)"  # 01 23 45 67 89
    rf"|(?<![\w+])\+\s?{_DIGIT}{_NEXT}{{7,14}}{_REST}"  # +49 170 1234567
    rf"|{_BEFORE}{_ZERO}{{2}}{_DIGIT}{_NEXT}{{8,13}}{_REST}"  # 0049 170 1234567
    rf"|{_BEFORE}\({_ZERO}{_DIGIT}\d{{0,3}}\){_NEXT}{{5,9}}{_REST}"  # (030) 1234 5678
    rf"|{_BEFORE}{_NO_DATE}{_ZERO}{_DIGIT}{_NEXT}{{7,10}}{_REST}",  # 020 7946 0958
    re.IGNORECASE,
)


def masked(text: str, private: Private) -> str:
    """The text with `[email]`, `[phone]`, … in place of the personal data that the rules mask.

    The marks are plain words: a tokenizer reads them as text and no special token can be mistaken for them.
    """
    while True:
        found = text
        for name, mark in MASKS.items():
            if getattr(private, name) == "mask":
                text = _SUBSTITUTES[name](text, mark)
        # Of two that touch, only the first begins like one, until it is masked.
        if text == found:
            return text


def is_personal(text: str, private: Private) -> bool:
    """Whether the text holds personal data for which the rules drop a sample."""
    return any(
        getattr(private, name) == "drop" and _SUBSTITUTES[name](text, mark) != text for name, mark in MASKS.items()
    )


def _without_emails(text: str, mark: str) -> str:
    return EMAIL.sub(mark, text)


def _without_cards(text: str, mark: str) -> str:
    return CARD.sub(lambda match: mark if _luhn(match[0]) else match[0], text)


def _without_ips(text: str, mark: str) -> str:
    return IP.sub(lambda match: mark if _is_ip(match[0]) else match[0], text)


def _without_phones(text: str, mark: str) -> str:
    # Counted first, as few captions have the digits and the pattern is dear.
    if sum(map(str.isdigit, text)) < 6:
        return text

    def substitute(match: re.Match[str]) -> str:
        start = match.start("announced")
        return mark if start < 0 else match[0][: start - match.start()] + mark

    return PHONE.sub(substitute, text)


_SUBSTITUTES: dict[str, Callable[[str, str], str]] = {
    "emails": _without_emails,
    "cards": _without_cards,
    "ips": _without_ips,
    "phones": _without_phones,
}


def _luhn(number: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812)."""
    digits = [int(digit) for digit in number if digit.isdigit()][::-1]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
