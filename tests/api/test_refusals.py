"""What a person may not ask of a model: each mistake is named in one line, with the mend."""

from __future__ import annotations

import pytest

import vlm
from vlm.api import user_turn
from vlm.errors import UsageError
from vlm.saving import save


def refusals(talker, filler, pictures, tmp_path) -> dict[str, tuple]:
    """Bad input by name: a call, and what its one line must say."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    ask = user_turn(pictures[:1], "What?")
    return {
        "empty question": (lambda: talker.answer(pictures[0], "  "), "the question is empty"),
        "empty prompt": (lambda: talker.complete(""), "the prompt is empty"),
        "empty text": (lambda: talker.embed_text([""]), "the text is empty"),
        "missing picture": (lambda: talker.caption(tmp_path / "none.png"), "none.png"),
        "broken picture": (lambda: talker.caption(broken), "broken.png"),
        "address": (lambda: talker.caption("https://example.org/cat.png"), "cat.png"),
        "no turn": (lambda: talker.generate([[]]), "must end with a user turn"),
        "nothing asked": (
            lambda: talker.generate([*ask, {"role": "assistant", "content": "a"}]),
            "end with a user turn",
        ),
        "nothing said": (lambda: talker.loglikelihood([ask]), "no assistant turn"),
        "no labels": (lambda: talker.classify(pictures[0], []), "0 labels"),
        "no mask": (lambda: filler.fill_mask("a"), "0 <mask> places"),
        "two masks": (lambda: filler.fill_mask("<mask> <mask>"), "2 <mask> places"),
        "mask first": (lambda: talker.fill_mask("<mask> a"), "before <mask>"),
        "too long": (lambda: talker.answer(pictures[0], "a" * 300), "takes 256"),
        "too long to weigh": (
            lambda: talker.loglikelihood([[*ask, {"role": "assistant", "content": "a" * 300}]]),
            "takes 256",
        ),
        "streamed beams": (lambda: talker.stream(ask, num_beams=2), "num_beams is 2"),
        "temperature": (lambda: talker.generate(ask, temperature=-1), "temperature is -1"),
        "top_p": (lambda: talker.generate(ask, top_p=1.5), "top_p is 1.5"),
        "top_k": (lambda: talker.generate(ask, top_k=0), "top_k is 0"),
        "batch_size": (lambda: talker.generate(ask, batch_size=0), "batch_size is 0"),
        "max_new_tokens": (lambda: talker.generate(ask, max_new_tokens=0), "max_new_tokens is 0"),
        "encoder caption": (lambda: filler.caption(pictures[0]), "'bert' reads both ways"),
        "encoder loglikelihood": (
            lambda: filler.loglikelihood([[*ask, {"role": "assistant", "content": "b"}]]),
            "'bert' reads both ways",
        ),
    }


def test_bad_input_is_refused_in_one_line(talker, filler, pictures, tmp_path):
    for name, (call, message) in refusals(talker, filler, pictures, tmp_path).items():
        with pytest.raises(vlm.UsageError) as refusal:
            call()
        assert message in str(refusal.value), name
        assert "\n" not in str(refusal.value) and ";" in str(refusal.value), name


WORDS = [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.fill_mask("a <mask> b", top_k=0), "top_k is 0"),
        (lambda m: m.generate("hello"), "takes conversations, not a string"),
        (lambda m: m.complete("a", top_k=5), "top_k is 5 and temperature is 0"),
        (
            lambda m: m.generate([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}]),
            "part of type 'video'",
        ),
        (lambda m: m.caption("https://example.com/a.jpg"), "addresses are not fetched"),
    ],
)
def test_a_mistake_is_named(call, says, make_model, make_processor):
    with pytest.raises(UsageError, match=says):
        call(vlm.VLM(make_model(), make_processor()))


def test_another_scheme_is_refused(tmp_path, talker):
    save(talker.model, talker.processor, tmp_path / "model")
    with pytest.raises(UsageError, match="quantization scheme 'int2' is unknown; choose int8 or int4"):
        vlm.load(tmp_path / "model", quantize="int2")


def test_match_takes_a_head_and_a_text_for_each_picture(talker, pictures, make_model, make_processor):
    with pytest.raises(UsageError, match="the model has no matching head; train it with matching_weight"):
        talker.match(pictures[0], "a cat")
    with pytest.raises(UsageError, match="match got 3 pictures and 2 texts; give one text for each picture"):
        talker.match(pictures, ["a", "b"])
