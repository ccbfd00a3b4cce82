"""The page of `vlm demo`: drop pictures, ask, watch the answer come, click a word and see where the model looked for it.

Knows Gradio, and the look of an answer as HTML and CSS without script. Knows nothing of how an answer or a map is made.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlm.api import VLM, user_turn
from vlm.errors import UsageError
from vlm.images import open_image
from vlm.looking import Look, looks, seen_part
from vlm.page import data_uri

HOST = "127.0.0.1"
MOST_BYTES = 64_000_000  # of one picture file; how many pixels it may have is for `vlm.images` to say
SMALL_BYTES, SIDE = 1_000_000, 1024  # of a picture as it is shown; a larger one is made smaller
FINER = 12  # pixels of a drawn map for each patch
LEVELS = 64
CARET = '<span class="caret"></span>'
# From a cool veil over what was left aside to a glow over what was looked at: red, green, blue, opacity.
COLOURS = ((16, 14, 48, 0.62), (96, 30, 120, 0.58), (214, 62, 92, 0.5), (250, 160, 50, 0.42), (255, 236, 130, 0.36))

STYLE = """
.gradio-container { max-width: 1240px !important; width: 100% !important; margin: 0 auto !important; }
.head h1 { font-size: 26px; font-weight: 680; letter-spacing: -0.02em; margin: 10px 0 2px; }
.head p { color: var(--body-text-color-subdued); margin: 0 0 6px; font-size: 14px; }
.answer { min-height: 430px; margin-top: -10px; padding: 20px 22px; border: 1px solid var(--border-color-primary);
  border-radius: 14px; background: var(--block-background-fill); }
.answer .quiet { color: var(--body-text-color-subdued); font-size: 14px; margin: 0; }
.answer .asked { color: var(--body-text-color-subdued); font-size: 14px; margin: 0 0 4px; }
.answer .said { font-size: 21px; line-height: 1.65; margin: 0 0 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer .fault { color: #c43d3d; font-weight: 550; margin: 0; }
.dark .answer .fault { color: #f08080; }
.answer .caret { display: inline-block; width: 9px; height: 20px; margin-left: 3px; vertical-align: -3px; border-radius: 2px;
  background: var(--color-accent); animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
.answer input { position: absolute; opacity: 0; width: 1px; height: 1px; margin: 0; pointer-events: none; }
.answer label { display: inline; cursor: pointer; border-radius: 6px; padding: 1px 3px; margin: 0 -3px;
  border-bottom: 2px dotted var(--border-color-accent); transition: background 0.15s; }
.answer label:hover { background: var(--color-accent-soft); }
.answer input:checked + label { background: var(--color-accent); color: #fff; border-bottom-color: transparent; }
.answer input:focus-visible + label { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.answer .all label { font-size: 13.5px; border: 1px solid var(--border-color-primary); border-radius: 999px;
  padding: 3px 11px; margin: 0; }
.answer .bar { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; margin: 0 0 14px;
  color: var(--body-text-color-subdued); font-size: 13px; }
.answer .ramp { display: inline-block; width: 110px; height: 10px; border-radius: 5px; margin: 0 7px; vertical-align: -1px; }
.answer .pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 14px;
  align-items: center; }
.answer figure { margin: 0; }
.answer .frame { position: relative; width: min(100%, 410px * var(--wide)); aspect-ratio: var(--wide); margin: 0 auto;
  border-radius: 10px; overflow: hidden; }
.answer .frame img { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; margin: 0; border-radius: 0; }
.answer .frame .heat { opacity: 0; transition: opacity 0.15s; }
.answer figcaption { text-align: center; color: var(--body-text-color-subdued); font-size: 13px; margin-top: 6px; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture as it is shown: its data URI, and its width as a multiple of its height."""

    uri: str
    wide: float


def launch(talker: VLM, name: str, port: int) -> None:
    """Serve the page for a model at 127.0.0.1 until it is interrupted. `name` stands in its head.

    Raises UsageError where Gradio is missing, the model can not generate, or the port is taken.
    """
    # Gradio would else tell its makers of every start, and ask a proxy whether the page is up.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST]))
    try:
        import gradio as gr
    except ImportError:
        raise UsageError("vlm demo: Gradio is not installed; pip install 'vlm[demo]'") from None
    talker.engine(rows=1)  # refuses a model that can not generate, now and not at the first question
    page = build(talker, name)
    theme = gr.themes.Soft(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            run_history=False,
            quiet=True,
            footer_links=[],
            max_file_size=MOST_BYTES,
            css=STYLE,
            theme=theme,
            prevent_thread_lock=True,
        )
    except OSError:
        raise UsageError(f"port {port} can not be had; choose another with --port") from None
    print(f"http://{HOST}:{port}", flush=True)
    page.block_thread()


def build(talker: VLM, name: str) -> Any:
    """The page as Gradio blocks."""
    import gradio as gr

    asks_for = talker.processor.caption_prompt
    # Pictures that were dropped are deleted after an hour, and when the server ends.
    with gr.Blocks(title=f"vlm demo: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f'<div class="head"><h1>Ask about a picture</h1><p>{escape(name)}</p></div>')
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                pictures = gr.Gallery(
                    label="Pictures",
                    show_label=False,
                    type="filepath",
                    sources=["upload", "clipboard"],
                    file_types=["image"],
                    interactive=True,
                    height=300,
                    columns=2,
                    fit_columns=False,
                    object_fit="contain",
                    buttons=[],
                    elem_id="pictures",
                )
                question = gr.Textbox(label="Question", placeholder=asks_for, lines=2, max_lines=6, elem_id="question")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("Settings", open=False):
                    most = gr.Slider(1, 512, value=64, step=1, label="Longest answer", info="in tokens")
                    temperature = gr.Slider(
                        0,
                        2,
                        value=0,
                        step=0.05,
                        label="Temperature",
                        info="0 takes the likeliest word, above 0 samples",
                    )
                    top_p = gr.Slider(
                        0.05, 1, value=1, step=0.05, label="Top-p", info="samples among the likeliest that hold p of it"
                    )
            with gr.Column(scale=7, min_width=320):
                shown = gr.HTML(
                    _framed(_quiet("The answer comes here. Click a word to see where the model looked for it."))
                )

        def answer(*given: Any) -> Iterator[str]:
            yield from answers(talker, *given)

        running = gr.on(
            [ask.click, question.submit],
            answer,
            [pictures, question, most, temperature, top_p],
            shown,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(lambda page: page.replace(CARET, ""), shown, shown, cancels=[running], api_visibility="private")
    return page


def answers(
    talker: VLM,
    pictures: Sequence[tuple[str, Any]] | None,
    question: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Iterator[str]:
    """The answer as HTML, as it comes; at last with its words to click. What goes wrong becomes one line.

    pictures: (path, caption) of each, as a gallery gives them. An empty question about a picture asks for a caption.
    """
    try:
        files = [Path(path) for path, _ in pictures or []]
        images = [open_image(file, name=file.name) for file in files]
        asked = question.strip() or (talker.processor.caption_prompt if images else "")
        messages = user_turn(images, asked)
        options: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "temperature": temperature}
        if temperature > 0:
            options["top_p"] = top_p
        said = ""
        for piece in talker.stream(messages, **options):
            said += piece
            yield _framed(_asked(asked), f'<p class="said">{escape(said.lstrip())}{CARET}</p>')
        words = looks(talker, messages, said)
        seen = [_as_seen(talker, file, image) for file, image in zip(files, images, strict=True)]
        yield _framed(_asked(asked), looked(words, seen))
    except UsageError as error:
        yield _framed(f'<p class="fault">{escape(" ".join(str(error).split()))}</p>')


def looked(words: Sequence[Look], pictures: Sequence[Picture]) -> str:
    """An answer whose words can be picked, by mouse or arrow keys, over its pictures with a map for each word."""
    if not words:
        return _quiet("The answer is empty.")
    seen = [look.weights for look in words if look.weights is not None]
    if not seen:
        shut = "The gates of its adapters are shut: the model looks at no picture."
        why = shut if pictures else "No picture was given, so there is nowhere to look."
        return f'<p class="said">{_text(words)}</p>{_figures(pictures, {})}{_quiet(why)}'
    patches = seen[0].numel()
    # One scale for the whole answer, so that words can be compared; at least that of twice as much as everywhere.
    peak = max(2 / patches, *(float(weights.max()) for weights in seen))
    layers: dict[int, list[str]] = {}
    rules, chips = [], []
    for number, look in enumerate(words):
        text = escape(look.text.lstrip() if number == 0 else look.text)
        if look.weights is None or look.picture is None:
            chips.append(text)
            continue
        word = text.lstrip()
        chips.append(text[: len(text) - len(word)] + _chip(f"look{number}", word.rstrip()))
        rules.append(_rule(f"look{number}"))
        layers.setdefault(look.picture, []).append(_layer(f"look{number}", look.weights, peak))
    picture = next(look.picture for look in words if look.picture is not None)
    mean = sum(seen[1:], seen[0]) / len(seen)
    layers[picture].append(_layer("lookall", mean, peak))
    ramp = ", ".join(f"rgba({red}, {green}, {blue}, {min(1.0, alpha + 0.3)})" for red, green, blue, alpha in COLOURS)
    return (
        f'<style>{"".join([*rules, _rule("lookall")])}</style><div class="looking"><p class="said">{"".join(chips)}</p>'
        f'<div class="bar"><span class="all">{_chip("lookall", "all words", checked=True)}</span><span>an even share'
        f'<i class="ramp" style="background: linear-gradient(90deg, {ramp})"></i>{peak * patches:.1f} × that</span></div>'
        f"{_figures(pictures, layers)}</div>"
    )


def heat(weights: Tensor, peak: float) -> bytes:
    """A map (h, w) as a PNG to lay over its picture: a veil where it is even or less, a full glow at `peak`."""
    even = 1 / weights.numel()
    strength = ((weights.float() - even) / (peak - even)).clamp(0, 1).numpy()
    height, width = strength.shape
    smooth = Image.fromarray(strength).resize((width * FINER, height * FINER), Image.Resampling.BICUBIC)
    image = Image.fromarray((np.asarray(smooth).clip(0, 1) * (LEVELS - 1)).round().astype(np.uint8), mode="P")
    at = np.linspace(0, len(COLOURS) - 1, LEVELS)
    channels = [np.interp(at, range(len(COLOURS)), channel) for channel in zip(*COLOURS, strict=True)]
    image.putpalette(np.stack(channels[:3], axis=1).round().astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", transparency=(channels[3] * 255).round().astype(np.uint8).tobytes())
    return file.getvalue()


def _as_seen(talker: VLM, file: Path, image: Image.Image) -> Picture:
    """What a map lies over: the file where the model saw all of it, else the part that it saw."""
    seen = seen_part(talker.processor, image)
    return shown(seen) if seen is not image else Picture(data_uri(file.read_bytes(), SMALL_BYTES, SIDE), wide(image))


def shown(image: Image.Image) -> Picture:
    """A picture that is no file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return Picture(data_uri(data.getvalue(), SMALL_BYTES, SIDE), wide(image))


def wide(image: Image.Image) -> float:
    """Its width as a multiple of its height."""
    return image.width / image.height


def _figures(pictures: Sequence[Picture], layers: dict[int, list[str]]) -> str:
    figures = []
    for index, picture in enumerate(pictures):
        note = "" if index in layers or not layers else "<figcaption>no word of the answer looked here</figcaption>"
        shown = f'<img alt="picture {index + 1}" src="{picture.uri}">{"".join(layers.get(index, []))}'
        figures.append(f'<figure><div class="frame" style="--wide: {picture.wide:.4f}">{shown}</div>{note}</figure>')
    return f'<div class="pictures">{"".join(figures)}</div>'


def _layer(name: str, weights: Tensor, peak: float) -> str:
    data = base64.b64encode(heat(weights, peak)).decode("ascii")
    return f'<img class="heat {name}" alt="" src="data:image/png;base64,{data}">'


def _chip(name: str, text: str, checked: bool = False) -> str:
    return (
        f'<input type="radio" name="look" id="{name}"{" checked" if checked else ""}><label for="{name}">{text}</label>'
    )


def _rule(name: str) -> str:
    return f".looking:has(#{name}:checked) .{name} {{ opacity: 1 !important; }}\n"


def _text(words: Sequence[Look]) -> str:
    return escape("".join(look.text for look in words).strip())


def _asked(question: str) -> str:
    return f'<p class="asked">{escape(question)}</p>'


def _quiet(sentence: str) -> str:
    return f'<p class="quiet">{escape(sentence)}</p>'


def _framed(*body: str) -> str:
    return f'<div class="answer" aria-live="polite">{"".join(body)}</div>'
