"""Perplexity of text alone: WikiText-2, WikiText-103, and plain files.

Knows these layouts:

* `wikitext2`, `wikitext103`, https://huggingface.co/datasets/Salesforce/wikitext (the raw archives of Merity et al. 2016):
  wikitext-2-raw/wiki.test.raw or wiki.test.raw. A document is an article; it is brought back to plain English and counted
  as EleutherAI's lm-evaluation-harness does.
* `text`: a .txt file, or a folder of them; a document is a file.

Long documents are read in windows of 1 024 tokens. Perplexity per token depends on the tokenizer, that per word (what white
space separates) and per byte (of UTF-8) does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from vlm.errors import UsageError

from ..metrics.perplexity import perplexities, perplexity
from .base import Item, Rolling, Scored
from .benchmark import Benchmark, Example, Way
from .reading import first_of

WINDOW = 1024
_TITLE = re.compile(r"(?m)^(?= = [^=\n]+ = $)")


def _read_wikitext(folder: Path, name: str) -> Iterator[Example]:
    path = first_of(folder, f"{name}/wiki.test.raw", "wiki.test.raw")
    articles = [article for article in _TITLE.split(path.read_text("utf-8")) if article.strip()]
    for place, article in enumerate(articles):
        title = article.strip().partition("\n")[0].strip(" =")
        yield Example(place, question=_as_english(article), answers=(title,), key=title, about={"text": article})


def _as_english(text: str) -> str:
    """WikiText's marks of tokenization taken back: lm-evaluation-harness, tasks/wikitext/preprocess_wikitext.py."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for start, end in ("()", "[]", "{}", '""', "''"):
        text = re.sub(rf"\{start}\s*([^\{end}]*?)\s*\{end}", rf"{start}\1{end}", text)
    for marks in ("= = = =", "= = =", "= ="):
        text = text.replace(marks, marks.replace(" ", ""))
    text = text.replace(f" {chr(176)} ", chr(176))
    return text.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


def _read_files(folder: Path) -> Iterator[Example]:
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.txt"))
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
        if text.strip():
            yield Example(path.name, question=text, answers=(path.name,), about={"text": text})


def _metric(items: Sequence[Item], weighed: Sequence[tuple[float, int]]) -> Scored:
    metrics = perplexities(weighed, [item.about["text"] for item in items])
    tokens = sum(count for _, count in weighed)
    return Scored(metrics | {"tokens": tokens}, [None] * len(items), [perplexity([one]) for one in weighed])


WAYS = {"weigh": Way("{question}", Rolling(WINDOW), lambda items, weighed: weighed)}
BENCHMARKS = tuple(
    Benchmark(name=name, headline="word_perplexity", read=read, ways=WAYS, metric=_metric, less_is_better=True)
    for name, read in (
        ("wikitext2", partial(_read_wikitext, name="wikitext-2-raw")),
        ("wikitext103", partial(_read_wikitext, name="wikitext-103-raw")),
        ("text", _read_files),
    )
)
