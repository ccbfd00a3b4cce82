"""The trained tokenizer: nothing is lost in it, and the same text makes the same one."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from vlm.errors import UsageError
from vlm.processing import complete_tokenizer
from vlm.shards import ShardWriter
from vlm.train.tokenizer import SPECIAL_TOKENS, as_transformers, train_bpe, training_texts

TEXTS = ["There is a red circle left of a blue square.", "What colour is the circle?", "red", "blue"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of the texts above."""
    return complete_tokenizer(as_transformers(train_bpe(iter(TEXTS), 400), 128))


@pytest.mark.parametrize(
    "text",
    ["A red circle.", " two  spaces \n\t", "naïve 日本語 🙂", "12345", "don't", "", "  ", "\x00\x7f", "<b> | <|"],
)
def test_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_words_that_occur_often_are_whole(tokenizer):
    assert len(tokenizer(" circle")["input_ids"]) == 1
    assert len(tokenizer("There is a red circle")["input_ids"]) == 5


def test_special_tokens_come_first_and_are_single(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(len(SPECIAL_TOKENS)))
    ids = tokenizer("<image>red<mask>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<image>", "red", "<mask>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red"
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.mask_token) == ("<pad>", "<eos>", "<mask>")


def test_same_text_same_tokenizer():
    assert train_bpe(iter(TEXTS), 400) == train_bpe(iter(TEXTS), 400)
    assert train_bpe(iter(TEXTS), 400) != train_bpe(iter(TEXTS[1:3]), 400)


def test_saved_and_loaded(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>There is a red <mask>.<|assistant|>ja"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


def test_vocabulary_without_room_for_bytes():
    with pytest.raises(UsageError, match="vocab_size is 100; 262 are taken"):
        train_bpe(iter(TEXTS), 100)


def test_texts_of_shards(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "look"}]},
        {"role": "assistant", "content": "seen"},
    ]
    samples = {
        "a": {"caption": "one thing", "qa": [{"question": "how many?", "answer": "1"}]},
        "b": {"messages": messages},
        "c": {"text": "plain words"},
        "d": {"question": " ", "answer": "dropped"},
    }
    with ShardWriter(tmp_path / "set") as writer:
        for key, fields in samples.items():
            writer.write(key, {"png": picture.getvalue(), "json": json.dumps(fields).encode()})
    texts = list(training_texts([str(tmp_path / "set")], "Describe."))
    assert {"Describe.", "one thing", "how many?", "1", "look", "seen", "plain words"} <= set(texts)
    assert "dropped" not in texts
