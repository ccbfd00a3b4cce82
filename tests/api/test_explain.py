"""Explanations of answers: against talkers whose truth is known, and the page that shows them."""

from __future__ import annotations

import io
import re
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from vlm.api import user_turn
from vlm.errors import UsageError
from vlm.explain import divided, explain, remaining, without
from vlm.explain_page import AGAINST, FOR, STRONGEST, coloured, page, write_explanation
from vlm.looking import looks

QUESTION = "What colour is it?"
WORTH = {"What": -1.0, "colour": 2.0, "is": 0.0, "it?": 0.5}
FIELD = 8  # pixels of a region's side in `board`


def board() -> Image.Image:
    """4 × 4 fields of 8 pixels, each of a colour far from the mean."""
    fields = np.random.default_rng(0).integers(0, 2, (4, 4, 3)).astype(np.uint8) * 255
    return Image.fromarray(fields.repeat(FIELD, axis=0).repeat(FIELD, axis=1))


class Stub(vlm.VLM):
    """Says `blue`, whose log p is linear in what is left of `board` and of the question."""

    def __init__(self, model, processor, truth: np.ndarray) -> None:
        super().__init__(model, processor)
        self.truth, self.sizes = truth, []

    def generate(self, messages, **options):
        return "blue"

    def loglikelihood(self, conversations, *, batch_size=32):
        self.sizes.append(len(conversations))
        return [(self.worth(asked, reply), 5) for asked, reply in conversations]

    def worth(self, asked, reply) -> float:
        assert reply == {"role": "assistant", "content": "blue"}
        image, text = (part.get("image", part.get("text")) for part in asked["content"])
        same = (np.asarray(image) == np.asarray(board())).all(axis=2)
        kept = same.reshape(4, FIELD, 4, FIELD).all(axis=(1, 3)).flatten()
        return float(kept @ self.truth) + sum(WORTH[word] for word in text.split()) - 9.0


@pytest.fixture
def stub(make_model, make_processor) -> Stub:
    truth = np.random.default_rng(2).normal(size=16)
    truth[[3, 7, 8]] = 0.0
    return Stub(make_model(gate_init=1.0), make_processor(), truth)


@pytest.fixture
def talker(make_model, make_processor) -> vlm.VLM:
    return vlm.VLM(make_model(gate_init=1.0), make_processor())


# What is found


def test_a_linear_truth_is_recovered(stub):
    told = explain(stub, board(), QUESTION, grid=4, samples=200, batch_size=16)
    np.testing.assert_allclose(told.region_weights, stub.truth, rtol=1e-5, atol=1e-6)
    assert np.abs(told.region_weights[[3, 7, 8]]).max() < 1e-6, "the answer does not depend on these"
    assert [text for text, _ in told.words] == ["What", " colour", " is", " it?"]
    assert [weight for _, weight in told.words] == pytest.approx(list(WORTH.values()), abs=1e-5)
    assert told.region_fidelity == pytest.approx(1.0) and told.word_fidelity == pytest.approx(1.0)
    assert told.log_probability == pytest.approx(stub.truth.sum() + 1.5 - 9.0)
    assert (told.answer, told.samples, told.seed) == ("blue", 200, 0) and max(stub.sizes) == 16
    assert told.regions.shape == (32, 32) and np.array_equal(np.unique(told.regions), np.arange(16))


def test_a_model_that_sees_nothing_hangs_on_no_region(make_model, make_processor, make_picture):
    shut = vlm.VLM(make_model(gate_init=0.0), make_processor())
    told = shut.explain(make_picture(), QUESTION, grid=3, samples=40, max_new_tokens=3)
    assert np.abs(told.region_weights).max() < 1e-4 < max(abs(weight) for _, weight in told.words)
    assert all(look.weights is None for look in told.looks)


def test_a_model_that_sees_is_explained_the_same_again(talker, make_picture):
    options = {"grid": 3, "samples": 40, "max_new_tokens": 3}
    first, again = (talker.explain(make_picture(), QUESTION, seed=5, **options) for _ in range(2))
    other = talker.explain(make_picture(), QUESTION, seed=6, **options)
    assert np.array_equal(first.region_weights, again.region_weights) and first.words == again.words
    assert not np.array_equal(first.region_weights, other.region_weights)
    asked = user_turn([make_picture()], QUESTION)
    assert first.answer == talker.generate(asked, max_new_tokens=3)
    ((expected, _),) = talker.loglikelihood([[*asked, {"role": "assistant", "content": first.answer}]])
    assert first.log_probability == pytest.approx(expected, abs=1e-5)
    assert np.abs(first.region_weights).max() > 1e-4 and 0 < first.region_fidelity <= 1
    expected_looks = looks(talker, asked, first.answer)
    assert [look.text for look in first.looks] == [look.text for look in expected_looks]
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(first.looks, expected_looks, strict=True))


def test_batches_change_nothing(talker, make_picture):
    one, many = (
        talker.explain(make_picture(), QUESTION, grid=2, samples=20, max_new_tokens=2, batch_size=size)
        for size in (1, 64)
    )
    np.testing.assert_allclose(one.region_weights, many.region_weights, rtol=1e-3, atol=1e-4)


# What is left out


def test_regions_cover_the_picture_once():
    regions = divided(10, 7, 3)
    assert regions.shape == (10, 7) and np.array_equal(np.unique(regions), np.arange(9))
    heights = [len(np.unique(np.nonzero(regions == number)[0])) for number in (0, 3, 6)]
    widths = [len(np.unique(np.nonzero(regions == number)[1])) for number in (0, 1, 2)]
    assert sum(heights) == 10 and sum(widths) == 7 and max(heights) - min(heights) <= 1 >= max(widths) - min(widths)


def test_a_region_gives_way_to_the_mean_colour(make_picture):
    picture = make_picture()
    regions = divided(picture.height, picture.width, 2)
    left = np.asarray(without(picture, regions, np.array([True, False, True, True])))
    pixels = np.asarray(picture)
    assert np.array_equal(left[regions != 1], pixels[regions != 1])
    assert (left[regions == 1] == pixels.mean(axis=(0, 1)).round()).all()
    assert np.array_equal(np.asarray(without(picture, regions, np.ones(4, bool))), pixels)


def test_words_go_with_the_space_before_them():
    words = ["Is", " the", "  cat", " red?"]
    assert remaining(words, np.array([True, False, True, True])) == "Is  cat red?"
    assert (
        remaining(words, np.array([False, True, False, False])) == "the" and remaining(words, np.zeros(4, bool)) == ""
    )


# The page


def test_the_page_shows_it_all_without_network(stub, tmp_path):
    told = explain(stub, board(), QUESTION, grid=4, samples=40)
    out = write_explanation(told, tmp_path / "why.html")
    text = out.read_text("utf-8")
    assert not re.search(r"<script|https?://|@import|url\(", text)
    assert "<h1>blue</h1>" in text and f"{told.log_probability:.2f}" in text and "16 regions, 40 samples" in text
    for word, weight in told.words:
        hue = ", ".join(map(str, FOR if weight >= 0 else AGAINST))
        shown = re.escape(f"{word.strip()}<small>{abs(weight):.2f}</small>").replace("<small>", "<small>[+-]")
        assert re.search(rf"rgba\({hue}, [\d.]+\)'>{shown}", text)
    assert "is<small>+0.00</small>" in text
    pictures = [Image.open(io.BytesIO(b64decode(data))) for data in re.findall(r"base64,([\w+/=]+)", text)]
    assert pictures[0].size == (32, 32) and len(pictures) >= 4
    assert np.array_equal(np.asarray(pictures[0].convert("RGB")), np.asarray(board()))


def test_what_it_says_is_escaped(stub):
    stub.generate = lambda messages, **options: "<b>blue</b>"
    stub.loglikelihood = lambda conversations, **options: [(-1.0, 2)] * len(conversations)
    text = page(explain(stub, board(), "Is <i> & <script> it?", grid=2, samples=20))
    assert "<script" not in text and "<b>blue" not in text and "&lt;script&gt;" in text
    assert "&lt;b&gt;blue&lt;/b&gt;" in text


def test_colours_say_for_and_against():
    regions = divided(4, 4, 2)
    image = np.asarray(Image.open(io.BytesIO(coloured(regions, np.array([2.0, -1.0, 0.0, 0.5])))).convert("RGBA"))
    assert tuple(image[0, 0]) == (*FOR, round(255 * STRONGEST))
    assert tuple(image[0, 3]) == (*AGAINST, round(255 * STRONGEST / 2))
    assert image[3, 0, 3] == 0 and tuple(image[3, 3, :3]) == FOR
    assert not np.asarray(Image.open(io.BytesIO(coloured(regions, np.zeros(4)))).convert("RGBA"))[..., 3].any()


# What is refused


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        (" \n", {}, "the question is empty; write at least one word"),
        (QUESTION, {"samples": 49}, "49 samples do not tell 49 regions apart; take at least 50, or a smaller grid"),
        ("why " * 60, {"samples": 60}, "60 samples do not tell 60 words apart; take at least 61"),
        (QUESTION, {"grid": 0}, "grid is 0 and the picture has 32×32 pixels; take 1 to 32"),
        (QUESTION, {"grid": 33}, "grid is 33 and the picture has 32×32 pixels; take 1 to 32"),
    ],
)
def test_what_cannot_be_explained(stub, question, options, words):
    with pytest.raises(UsageError, match=words):
        stub.explain(board(), question, **options)


def test_a_picture_that_cannot_be_read(stub, tmp_path):
    with pytest.raises(UsageError, match="no such image file"):
        stub.explain(tmp_path / "none.png", QUESTION)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    with pytest.raises(UsageError, match="header can not be read"):
        stub.explain(tmp_path / "broken.png", QUESTION)


def test_an_encoder_does_not_answer(make_model, make_processor):
    with pytest.raises(UsageError, match="bert"):
        vlm.VLM(make_model("bert"), make_processor()).explain(board(), QUESTION)
