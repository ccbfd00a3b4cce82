"""Penn-Treebank-style tokens of captions, as coco-caption makes them. Knows English spelling; nothing of metrics.

coco-caption tokenizes with the Stanford tokenizer (Java; CoreNLP 3.4.1, `PTBTokenizer -preserveLines -lowerCase`) and
drops punctuation. Here is the same behaviour, written anew as one regular expression and held to outputs of the Java
program by the tests. Of rules that match at one place the first wins, so longer readings stand before shorter ones.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

# What coco-caption drops. It compares these with lower-cased tokens, so brackets (`-lrb-`) stay, there and here.
DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

LETTER = r"[^\W\d_\u00B2\u00B3\u00B9\u00BC-\u00BE\u2070-\u209C\u2150-\u218F\u2460-\u24FF]"
# Inside a word: also digits, marks that ride on letters, soft and non-breaking hyphens, vowels spelled `&eacute;`.
MARKS = r"\u0300-\u036F\u0591-\u05C7\u0610-\u061A\u064B-\u0670\u06D6-\u06ED\u0900-\u0963\u0966-\u0DFF\u0E31-\u0E4E"
VOWEL_ENTITY = r"&[aeiouAEIOU](?i:acute|grave|uml);"
INNER = rf"(?:{LETTER}|[\d{MARKS}\u00AD\u2010\u2011]|{VOWEL_ENTITY})"
END = rf"(?!{INNER})"
APOSTROPHE = r"(?:['\u2019\u0092]|&apos;)"
APOSTROPHE_LIKE = r"(?:['\u2019\u0092`\u2018\u0091\u201B]|&apos;)"
CLITIC = r"(?i:[smd]|re|ve|ll)"
# A word that holds its apostrophe: O'Brien, d'Azur.
APOSTROPHE_WORD = rf"[A-HJ-XZdljno]{APOSTROPHE}(?!{CLITIC}{END}){LETTER}{{2,}}"

# Abbreviations that keep their full stop: anywhere; only capitalised, being words else; only before a number.
ABBREVIATIONS = """
    adj adm adv al ala apr ariz assn assoc asst atty aug ave bldg blvd brig bros calif capt cf cie cmdr co col colo
    comdr conn corp cos cpl ct dec dept dr drs ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp
    intl jan jr jul jun kan kans ky lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms msgr mt natl
    neb nev nov oct okla penn ph plc pres prof profs pvt rd rep reps rev sen sens sep sept seq sgt sq sr st ste supt
    tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wyo
""".split()
CAPITAL_ABBREVIATIONS = "Ark Del Ill La Mass Miss Ore Pa Tex Wash ARK DEL ILL LA MASS MISS ORE PA TEX WASH".split()
NUMBERED_ABBREVIATIONS = "art ca fig figs no nos op pp".split()
# A single letter keeps its full stop (J. Smith) unless the text ends there or one of these begins a sentence.
SENTENCE_STARTS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
""".split()
# Words that come apart after the bar.
SPLIT_WORDS = "can|not gon|na wan|na got|ta gim|me lem|me".split()


def _any(words: list[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


def _or(*patterns: str) -> str:
    return "|".join(patterns)


RULES = {
    # The common case first, for speed: letters up to a space.
    "plain": rf"(?!(?i:{_any([w.replace('|', '') for w in SPLIT_WORDS])})\b)[A-Za-z]+(?=\s|$)",
    "tag": r"</?[A-Za-z][\w:.@+-]*(?:\s+[A-Za-z][\w:.-]*(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'|\w+))?)*\s*/?>",
    "address": _or(
        r"(?i:https?)://[^ \t\n<>\"|(){}]*[^ \t\n<>\"|(){}.,!?-]",
        r"[\u00A0*~+#%&“”‘’]*www\.(?:[\w-]+\.)+[A-Za-z]{2,4}",
        r"[\u00A0*~+#%&“”‘’]+(?:[a-z]*\.)+(?i:com|net|org|edu)",
        r"(?:[a-z]+\.)+(?:com|net|org|edu)/[^ \t\n<>\"|(){}]+[^ \t\n<>\"|(){}.,!?-]",
        r"[A-Za-z0-9][^\s<>\"|()@]*@[^\s<>\"|().]+(?:\.[^\s<>\"|().]+)*",
    ),
    "handle": rf"#{LETTER}(?:{LETTER}|[{MARKS}])*|@[A-Za-z_]\w*",
    "smiley": r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?!\w)|\^_\^|-_-",
    "language": r"[Cc]\+\+|[CcFf]#",
    "split": _or(
        *(
            rf"(?i:{head}(?={tail}{END}(?!-\w|{APOSTROPHE}{LETTER})))"
            for head, tail in (word.split("|") for word in SPLIT_WORDS)
        ),
        rf"{APOSTROPHE}(?i:t(?=is|was))",
    ),
    "phone": r"(?:\(\d{2,3}\)[ \u00A0]?|(?:\d{2,4}[- \u00A0])?\d{2,4}[- \u00A0])\d{3,4}[- \u00A0]?\d{3,5}(?!\w)",
    "fraction": _or(
        rf"\d{{1,4}}/\d{{1,4}}(?:-{LETTER}{INNER}*)+",
        r"(?:\d{1,4}[- \u00A0])?\d{1,4}[/\u2044]\d{1,4}(?![\d/]|[^\W_])",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}(?!\d)",
    ),
    "slashed": r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
    "underscored": rf"{INNER}+(?:-{INNER}+)*(?:_+{INNER}+(?:-{INNER}+)*)+",
    "hyphened": rf"{INNER}(?:{INNER}|[.,](?=[\w.,]*-{INNER}))*"
    rf"(?:-(?:{LETTER}(?:\.{LETTER})+\.|{APOSTROPHE_WORD}|{INNER}+))+(?:\.(?=[,;:]))?",
    "negated": rf"{LETTER}*[A-MO-Za-mo-z](?=[nN]{APOSTROPHE_LIKE}[tT])",
    "not": rf"[nN]{APOSTROPHE_LIKE}[tT](?!{LETTER})",
    "run_on": rf"[nN]{APOSTROPHE_LIKE}[tT]{LETTER}+",
    "clipped": _or(
        rf"{APOSTROPHE}[nN]{APOSTROPHE}(?![tT]{END})",
        rf"{APOSTROPHE}n{END}",
        rf"(?i:dunkin|somethin|ol){APOSTROPHE}(?!{LETTER})",
        rf"{APOSTROPHE}(?i:em|(?:till?|cause){END})",
        rf"{APOSTROPHE}[2-9]0[sS]",
        rf"{APOSTROPHE}\d\d(?=\s|$)",
    ),
    "clitic": rf"{APOSTROPHE}{CLITIC}(?!{LETTER})|\u2019{CLITIC}",
    "you": rf"[yY]{APOSTROPHE}(?=(?i:all|know))",
    "own_apostrophe": _or(
        rf"(?i:c{APOSTROPHE}mon|e{APOSTROPHE}er|ev{APOSTROPHE}ry|li{APOSTROPHE}l|nat{APOSTROPHE}l){END}",
        rf"(?i:nor{APOSTROPHE}easter|cap{APOSTROPHE}n|o{APOSTROPHE}clock|ma{APOSTROPHE}am|s{APOSTROPHE}mores){END}",
        rf"{APOSTROPHE_WORD}(?:-{INNER}+)*",
        rf"{LETTER}*[aeiouyAEIOUY]{APOSTROPHE_LIKE}(?!{CLITIC}{END})(?:[aeiou]|[A-Z]{LETTER}){LETTER}*",
        rf"[dDlLjJ]{APOSTROPHE}(?!{CLITIC}{END})(?:\d{INNER}*)?",
    ),
    "entity": rf"&(?i:amp|lt|gt|quot|nbsp|apos);|&[mn]dash;|&#\d+;|{VOWEL_ENTITY}",
    "money": r"[A-Z]*\$",
    "abbreviation": _or(
        rf"(?:(?i:{_any(ABBREVIATIONS)})|{_any(CAPITAL_ABBREVIATIONS)}|(?i:ph\.d)|{LETTER}(?:\.{LETTER})+)\.(?!{LETTER})",
        rf"(?i:{_any(NUMBERED_ABBREVIATIONS)})\.(?=\s?\d)",
        rf"[A-Za-z]\.(?!{LETTER}|\s*$|\s+{_any(SENTENCE_STARTS)}\s)",
        rf"{INNER}+\.(?=[,;:])",
    ),
    "initials": r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+",
    "word": rf"{LETTER}{INNER}*(?:[.!?]{LETTER}{INNER}*)*",
    "release": rf"\d+(?:\.\d+)*\.[xX]{END}",
    "number": rf"[-+](?:\d+(?:[.:,]\d+)*|(?:[.:,]\d+)+)|\d+(?:[.:,]\d+)+|(?:[.:,]\d+)+|\d+{END}|\d{INNER}*",
    "dots": r"\.{3,5}|\.[ \u00A0]\.[ \u00A0]\.|\u2026",
    "run": r"[?!]+|-{2,}|_+|\*+|#+|@+|''|``|[“”‘’«»‹›`]{2}|<<|>>",
    # Every other sign stands alone, and what is in none of these ranges (emoji, most controls) vanishes.
    "mark": r"[!-~\u0080-\u009F\u00A1-\u00BF\u00D7\u00F7\u060C\u061B\u061F\u0964\u0965\u2013-\u2023\u2030-\u203B"
    r"\u203E-\u2042\u2044\u2070-\u208E\u20A4\u20AC\u2100-\u214F\u2153-\u215E\u2190-\u2BFF\u3001\u3002\u3012\u30FB"
    r"\uFF01-\uFF65\uFFE0-\uFFE6]",
}
TOKEN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in RULES.items()))

REWRITTEN = (
    dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))
    | dict(zip("¼½¾⅓⅔¢£€¤\u0080", "1/4 1/2 3/4 1/3 2/3 cents # $ $ $".split(), strict=True))
    | dict.fromkeys(["---", "----", *"\u2013\u2014\u2015\u0096\u0097"], "--")
    | dict.fromkeys('"“”«»‘’‹›‛\u0091\u0092\u0093\u0094', "'")
    | {"&lt;": "<", "&gt;": ">", "&quot;": "'", "&apos;": "'", "&nbsp;": "", "&mdash;": "--", "&ndash;": "--"}
)
# Inside longer tokens.
JOINED = str.maketrans({" ": "\u00a0", "\u2044": "/", "(": "-lrb-", ")": "-rrb-"})
PLAIN_QUOTES = str.maketrans(
    dict.fromkeys("’›\u0092", "'")
    | dict.fromkeys("‘‹\u0091", "`")
    | dict.fromkeys("“«", "``")
    | dict.fromkeys("”»", "''")
)
AS_THEY_ARE = frozenset(["plain", "word", "address", "run_on"])
SOFT_HYPHEN = "\u00ad"


# A caption of letters and commas with a full stop at its end, as most are, comes apart at its spaces.
SIMPLE = re.compile(r"[A-Za-z]+(?:,? +[A-Za-z]+)*( ?\.)? *")
# The words that need the rules above: those that come apart, and those that keep a full stop.
IRREGULAR = frozenset(word.replace("|", "") for word in SPLIT_WORDS)
STOPPED = frozenset(word.lower() for word in (*ABBREVIATIONS, *CAPITAL_ABBREVIATIONS, *string.ascii_lowercase))


def tokens(text: str, following: str = "") -> list[str]:
    """The lower-cased tokens of one line of English, punctuation included; quotation marks all come as `'`.

    following: the line after it. The Java program reads on across the line's end to tell whether a single letter there
    is an initial, which keeps its full stop.
    """
    found = []
    for match in TOKEN.finditer(f"{text}\n{following}" if following else text):
        if match.start() >= len(text):
            break
        token, kind = match.group().lower(), match.lastgroup
        if kind in ("phone", "fraction", "tag", "smiley"):
            token = token.translate(JOINED)
        elif kind == "dots":
            token = "..."
        elif kind not in AS_THEY_ARE:
            token = REWRITTEN.get(token, token).translate(PLAIN_QUOTES).replace("&amp;", "&").replace("&apos;", "'")
        found.append(token.replace(SOFT_HYPHEN, ""))
    return found


def tokenize(caption: str, following: str = "") -> str:
    """A caption as coco-caption's metrics see it: lower-cased tokens without punctuation, joined by single spaces.

    following: the caption after it in the file that the Java program is given; see `tokens`.
    """
    line = " ".join(caption.splitlines())
    simple = SIMPLE.fullmatch(line)
    if simple:
        words = line[: simple.start(1) if simple[1] else None].lower().replace(",", " ").split()
        if IRREGULAR.isdisjoint(words) and not (simple[1] and words[-1] in STOPPED):
            return " ".join(words)
    return " ".join(token for token in tokens(line, following) if token and token not in DROPPED)


def tokenize_all(captions: Sequence[str]) -> list[str]:
    """`tokenize` of the lines of one file, each read with the one that follows it."""
    return [tokenize(caption, after) for caption, after in zip(captions, [*captions[1:], ""], strict=False)]
