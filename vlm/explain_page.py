"""An explanation of an answer as a page: the regions and the words that it hung on, in colour, and where the model looked.

Knows HTML, and how an `Explanation` is to be read. Knows nothing of how one is made. One file without network or script.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.charts import percent
from vlm.demo import STYLE as LOOKED
from vlm.demo import Picture, looked, shown
from vlm.explain import Explanation
from vlm.files import atomic_write
from vlm.page import card, document, section, tile

FOR, AGAINST = (31, 138, 91), (196, 61, 61)  # what a kept part does to the answer: red, green, blue
STRONGEST = 0.72  # opacity of the part that weighs most
SIDE = 768  # most pixels of the coloured map

STYLE = """
:root { --border-color-primary: var(--rule); --body-text-color-subdued: var(--soft); --block-background-fill: var(--card);
  --border-color-accent: var(--c0); --color-accent: var(--c0); --color-accent-soft: var(--tint); }
.worth { font-size: 22px; line-height: 2; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.worth span { border-radius: 6px; padding: 3px 5px; } .worth small { color: var(--soft); font-size: 12px; margin-left: 4px; }
.answer { min-height: 0; margin-top: 0; } .answer .frame .regions { opacity: 1; image-rendering: pixelated; }
.answer figcaption { padding: 0; }
"""


def write_explanation(explanation: Explanation, out: str | Path) -> Path:
    """Write the page and return its path."""
    with atomic_write(Path(out)) as file:
        file.write(page(explanation).encode("utf-8", "replace"))
    return Path(out)


def page(told: Explanation) -> str:
    """The whole file."""
    head = (
        f"<header><p class='kicker'>{escape(told.question)}</p><h1>{escape(told.answer) or '(nothing)'}</h1>"
        "<p>What this answer hung on. A region or word in green made it likelier, one in red less likely; the deeper, the more."
        "</p></header>"
    )
    tiles = [
        tile(f"{told.log_probability:.2f}", "log p of the answer", "natural logarithm, the end of the answer included"),
        tile(percent(told.region_fidelity), "told by regions", "weighted R² of the linear model of regions"),
        tile(percent(told.word_fidelity), "told by words", "weighted R² of the linear model of words"),
    ]
    body = [
        head,
        f'<div class="tiles">{"".join(tiles)}</div>',
        section("Regions of the picture", _lead(told, "regions"), _pictures(told)),
        section("Words of the question", _lead(told, "words"), card(f'<p class="worth">{_words(told)}</p>')),
        section(
            "Where it looked",
            "The attention of its adapters for each word of the answer: pick one. It shows where the model looked, which is not "
            "yet why.",
            f'<div class="answer">{looked(told.looks, [shown(told.seen)])}</div>',
        ),
    ]
    return document(f"Why: {told.question}", "".join(body), LOOKED + STYLE)


def _lead(told: Explanation, what: str) -> str:
    count = len(told.region_weights) if what == "regions" else len(told.words)
    return (
        f"By LIME: {count} {what}, {told.samples} samples with some of them left out, seed {told.seed}. A weight is what a part "
        "adds to log p of the answer where it is kept."
    )


def _pictures(told: Explanation) -> str:
    picture, grey = shown(told.picture), shown(told.picture.convert("L"))  # its own colours would be taken for weights
    strongest = float(np.abs(told.region_weights).max())
    caption = f"the strongest region weighs {strongest:.3f}"
    return (
        f'<div class="answer"><div class="pictures">{_figure(picture, "", "as it is")}'
        f"{_figure(grey, _layer(told), caption)}</div></div>"
    )


def _figure(picture: Picture, layer: str, caption: str) -> str:
    return (
        f'<figure><div class="frame" style="--wide: {picture.wide:.4f}"><img alt="the picture" src="{picture.uri}">{layer}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _layer(told: Explanation) -> str:
    data = base64.b64encode(coloured(told.regions, told.region_weights)).decode("ascii")
    return f'<img class="heat regions" alt="its regions by their weights" src="data:image/png;base64,{data}">'


def coloured(regions: np.ndarray, weights: np.ndarray) -> bytes:
    """Regions (H, W) by their weights (R,) as a PNG to lay over the picture: green for, red against, clear at 0."""
    step = max(1, -(-max(regions.shape) // SIDE))
    colours = np.array([(*_hue(weight), round(255 * _strength(weight, weights))) for weight in weights], np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours[regions[::step, ::step]]).save(file, "PNG")
    return file.getvalue()


def _words(told: Explanation) -> str:
    every = np.array([weight for _, weight in told.words])
    parts = []
    for text, weight in told.words:
        word = text.lstrip()
        colour = f"rgba({', '.join(map(str, _hue(weight)))}, {_strength(weight, every):.3f})"
        parts.append(
            f"{escape(text[: len(text) - len(word)])}<span style='background: {colour}'>{escape(word)}"
            f"<small>{_signed(weight)}</small></span>"
        )
    return "".join(parts)


def _signed(weight: float) -> str:
    """Two digits, and no minus before nothing."""
    return f"{round(weight, 2) + 0.0:+.2f}"


def _hue(weight: float) -> tuple[int, int, int]:
    return FOR if weight >= 0 else AGAINST


def _strength(weight: float, every: np.ndarray) -> float:
    """Opacity, beside the weightiest of its kind."""
    most = float(np.abs(every).max())
    return STRONGEST * abs(float(weight)) / most if most > 0 else 0.0
