"""Augmented pictures: what their text speaks of is bit by bit as it was, and the same draw gives the same pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlm.augmentation import Augmentation
from vlm.data_tools.scene_world import LEVELS
from vlm.errors import UsageError
from vlm.wording import facts, is_negation, names, negated, said_by, words

EVERYTHING = Augmentation(mirror=1.0, crop=0.5, colour=0.5, light=0.5)
FREE = "people walk along with a dog"  # says nothing that mirror, colour and light would change
SIDES = [
    "a dog to the left of a cat",
    "Which is on the RIGHT?",
    "a left-hand turn",
    "it turns clockwise",
    "what do the letters say?",
    "a stop sign",
    "the bus reads downtown",
    'a shirt with "GO" on it',
    "a shirt that has ‘go’ on it",
    "what time is it?",
    "der Hund läuft nach links über die Straße",
]
PLACES = [
    "at the top",
    "in a corner",
    "how many dogs?",
    "three dogs",
    "2 dogs",
    "a tiny dog",
    "is there a dog?",
    "all dogs",
]
COLOURS = [
    "a red dog",
    "What colour is it?",
    "what color?",
    "grey clouds",
    "reddish leaves",
    "bluish haze",
    "golden hair",
]
LIGHTS = ["a dark street", "at night", "a bright room", "sunny hills"]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(pixels(first), pixels(second))


def hues(image: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, pixels(image).reshape(-1, 3).tolist()))


@pytest.fixture
def picture(make_picture) -> Image.Image:
    return make_picture(3)


@pytest.mark.parametrize("text", SIDES)
def test_no_mirror_where_a_side_or_writing_is_named(picture, text):
    for seed in range(5):
        (out,) = Augmentation(mirror=1.0)([picture], [FREE, text], np.random.default_rng(seed))
        assert same(out, picture)


@pytest.mark.parametrize("text", PLACES + SIDES)
def test_no_crop_where_a_place_number_or_size_is_named(picture, text):
    for seed in range(5):
        (out,) = Augmentation(crop=0.5)([picture], ["a dog", text], np.random.default_rng(seed))
        assert same(out, picture)


@pytest.mark.parametrize("text", COLOURS)
def test_no_pixel_has_another_colour_where_one_is_named(picture, text):
    for seed in range(5):
        (out,) = EVERYTHING([picture], [text], np.random.default_rng(seed))
        assert hues(out) <= hues(picture)


@pytest.mark.parametrize("text", LIGHTS)
def test_no_other_light_where_it_is_named(picture, text):
    (out,) = Augmentation(light=1.0)([picture], [text], np.random.default_rng(0))
    assert same(out, picture)
    (out,) = Augmentation(colour=1.0)([picture], [text], np.random.default_rng(0))
    assert not same(out, picture)


@pytest.mark.parametrize("one", ["mirror", "crop", "colour", "light"])
def test_each_change_is_made_where_nothing_forbids_it(picture, one):
    (out,) = Augmentation(**{one: 0.9})([picture], ["a dog"], np.random.default_rng(0))
    assert not same(out, picture)
    assert (out.size == picture.size) == (one != "crop")


def test_the_mirror_is_a_mirror_as_often_as_asked(picture):
    rng = np.random.default_rng(0)
    mirrored = [same(Augmentation(mirror=0.3)([picture], [FREE], rng)[0], ImageOps.mirror(picture)) for _ in range(400)]
    assert 0.2 < np.mean(mirrored) < 0.4


def test_another_hue_keeps_greys_and_brightness(picture):
    grey = picture.convert("L").convert("RGB")
    for seed in range(5):
        (out,) = Augmentation(colour=1.0)([grey], ["a dog"], np.random.default_rng(seed))
        assert np.abs(pixels(out).astype(int) - pixels(grey)).max() <= 1
    mild = Image.fromarray(pixels(picture) // 4 + 96)
    (out,) = Augmentation(colour=0.5)([mild], ["a dog"], np.random.default_rng(0))
    luma = [np.asarray(image.convert("L")).astype(int) for image in (mild, out)]
    assert np.abs(luma[0] - luma[1]).max() <= 2 and not same(out, mild)


def test_a_crop_is_a_part_of_the_picture_no_smaller_than_asked(picture):
    for seed in range(30):
        (out,) = Augmentation(crop=0.3)([picture], ["a dog"], np.random.default_rng(seed))
        assert out.width * out.height >= 0.66 * picture.width * picture.height
        windows = np.lib.stride_tricks.sliding_window_view(pixels(picture), (out.height, out.width, 3))
        assert (windows == pixels(out)).all(axis=(-1, -2, -3)).any()


def test_several_pictures_are_changed_alike(picture):
    for seed in range(10):
        first, second = EVERYTHING([picture, picture.copy()], ["a dog"], np.random.default_rng(seed))
        assert same(first, second)


def test_the_same_draw_gives_the_same_pictures_and_as_many_numbers_are_drawn(picture):
    texts = [["a dog"], ["a red dog on the left"], []]
    after = set()
    for text in texts:
        first, second = np.random.default_rng(7), np.random.default_rng(7)
        assert same(EVERYTHING([picture], text, first)[0], EVERYTHING([picture], text, second)[0])
        after.add(first.random())
    assert len(after) == 1


def test_without_anything_to_do_nothing_is_done(picture):
    (out,) = Augmentation()([picture], ["a dog"], np.random.default_rng(0))
    assert out is picture
    assert EVERYTHING([], ["a dog"], np.random.default_rng(0)) == []


@pytest.mark.parametrize(("one", "value"), [("mirror", 1.1), ("crop", 1.0), ("colour", -0.1), ("light", float("nan"))])
def test_a_share_that_is_none_is_refused(one, value):
    with pytest.raises(UsageError, match=f"{one} is .*; give a share from 0"):
        Augmentation(**{one: value})


# The words


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_every_word_of_the_drawn_scenes_is_known(level):
    assert all(names(colour, "colour") for colour in level.colours)
    assert all(names(size, "size") for size in level.sizes)
    assert all(names(form, "shape") for form in (*level.shapes, *level.textures))


def test_facts_are_counted_by_what_is_said():
    kinds = ("colour", "number", "size")
    assert facts("2 big gray dogs, no cat", *kinds) == facts("Two LARGE grey cats without a dog", *kinds)
    assert facts("a red dog", *kinds) != facts("a red, red dog", *kinds)
    assert facts("17 reds", *kinds) == {"number:17": 1, "colour:red": 1}
    assert facts("one red dog", "number") == {"number:one": 1}


@pytest.mark.parametrize("word", ["isn’t", "isn't", "No", "cannot", "without"])
def test_negations(word):
    assert is_negation(word)


def test_the_scope_of_a_negation_ends_with_its_sentence():
    text = "A dog without a collar, a leash or a coat. The cat isn't big but the sofa is"
    denied = [match[0] for match, inside in zip(words(text), negated(text), strict=True) if inside]
    assert denied == "without a collar a leash or a coat isn't big".split()


def test_words_without_a_fact():
    assert not any(said_by(word) for word in "dog sofa walking the a and is people".split())
