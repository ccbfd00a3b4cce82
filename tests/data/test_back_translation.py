"""Back-translation: real models go both ways, and what came back with another fact, answer or denial is not used."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vlm.data_tools.augment import Texts, augmented
from vlm.data_tools.back_translation import BackTranslation, Seq2Seq, back_translate, fault
from vlm.errors import UsageError
from vlm.shards import ShardWriter

ENGLISH = ["a red couch stands here .", "two dogs run .", "a man rides a bike .", "is the dog on the left ?"]
GERMAN = ["ein rotes sofa steht hier .", "zwei hunde laufen .", "ein mann faehrt rad .", "ist der hund links ?"]
AGAIN = ["here stands a red sofa .", "three dogs run .", "a man is riding a bike .", "is the dog left ?"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def tokenizer_of(texts: list[str]) -> hf.PreTrainedTokenizerFast:
    """Words between spaces, the end token behind each text."""
    vocabulary = SPECIAL + sorted({word for text in texts for word in text.split()})
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **names)


def bart_of(words: int) -> hf.BartForConditionalGeneration:
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))
    }
    config = hf.BartConfig(
        vocab_size=words, d_model=32, max_position_embeddings=64, dropout=0.0, forced_eos_token_id=None, **sizes
    )
    return hf.BartForConditionalGeneration(config)


def taught(folder: Path, sources: list[str], targets: list[str]) -> str:
    """A model that translates these sentences, learnt by heart."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(sources + targets)
    model = bart_of(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = tokenizer(sources, padding=True, return_tensors="pt")
    labels = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
    labels[labels == tokenizer.pad_token_id] = -100
    for _ in range(80):
        loss = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return taught(folder / "there", ENGLISH, GERMAN), taught(folder / "back", GERMAN, AGAIN)


# Models


def test_a_text_goes_there_and_comes_back(pair):
    there, back = (Seq2Seq(model, "", 0.0, 2, "cpu") for model in pair)
    assert there(ENGLISH, 0) == GERMAN
    assert back(GERMAN, 0) == AGAIN
    assert there([], 0) == []


def test_samples_are_reworded_and_marked(pair, tmp_path):
    with ShardWriter(tmp_path / "in") as writer:
        for number, text in enumerate(ENGLISH[:3]):
            writer.write(f"{number}", {"png": b"p", "json": json.dumps({"caption": text}).encode()})
        asked = {"question": ENGLISH[3], "answer": "yes"}
        writer.write("3", {"png": b"p", "json": json.dumps({"caption": ENGLISH[0], **asked}).encode()})
    how, counts = BackTranslation(*pair, batch=3, device="cpu"), Counter()
    made = dict(augmented(tmp_path / "in" / "00000.tar", how, counts))
    new = {key: json.loads(parts["json"]) for key, parts in made.items() if "-" in key}
    marks = {"augmented": "back-translation", "original": "0"}
    assert new["0-bt1"] == {"caption": AGAIN[0]} | marks
    assert new["2-bt1"] == {"caption": AGAIN[2]} | marks | {"original": "2"}
    assert new["3-bt1"] == {"caption": AGAIN[0], "question": AGAIN[3], "answer": "yes"} | marks | {"original": "3"}
    assert set(new) == {"0-bt1", "2-bt1", "3-bt1"}  # two dogs came back as three
    assert counts == {"originals": 4, "augmented": 3, "unchanged": 1, "texts": 5, "kept_for_facts": 1}
    assert dict(augmented(tmp_path / "in" / "00000.tar", how, Counter())) == made


def test_sampling_follows_the_seed_and_leaves_the_global_generator(pair):
    wild = Seq2Seq(pair[0], "", 5.0, 2, "cpu")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = [wild(ENGLISH, seed) for seed in range(4)]
    assert torch.equal(torch.rand(1), expected)
    assert [wild(ENGLISH, seed) for seed in range(4)] == first
    assert len({str(one) for one in first}) > 1


def test_what_is_too_long_or_never_ends_is_not_translated(pair):
    there = Seq2Seq(pair[0], "", 0.0, 2, "cpu")
    assert there(["a dog " * 40, ENGLISH[1]], 0) == [None, GERMAN[1]]
    there.model.generation_config.eos_token_id = len(there.tokenizer) + 5
    assert there(ENGLISH, 0) == [None] * 4


def test_a_prefix_goes_in_front(pair):
    plain, prefixed = Seq2Seq(pair[0], "", 0.0, 2, "cpu"), Seq2Seq(pair[0], "two dogs ", 0.0, 2, "cpu")
    assert prefixed(["run ."], 0) == plain(["two dogs run ."], 0) == [GERMAN[1]]


@pytest.mark.parametrize(
    "config",
    [
        hf.MarianConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, max_position_embeddings=64,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, forced_eos_token_id=None,
        ),
        hf.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        ),
    ],
    ids=["marian", "t5"],
)  # fmt: skip
def test_other_families_load_and_translate(config, tmp_path):
    torch.manual_seed(0)
    hf.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    tokenizer_of(ENGLISH).save_pretrained(tmp_path)
    one = Seq2Seq(str(tmp_path), "", 1.0, 3, "cpu")
    translated = one(ENGLISH, 0)
    assert len(translated) == 4 and all(text is None or isinstance(text, str) for text in translated)
    assert one(ENGLISH, 0) == translated


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="translation model .*none: can not be loaded .*; give a path or hub id"):
        BackTranslation(str(tmp_path / "none"), "x")([Texts("a", ("a",), frozenset())], Counter())


def test_settings():
    how = BackTranslation("a", "b", batch=3)
    assert pickle.loads(pickle.dumps(how)) == how
    with pytest.raises(UsageError, match="temperature is -1"):
        BackTranslation("a", "b", temperature=-1)
    with pytest.raises(UsageError, match="batch is 0 texts"):
        BackTranslation("a", "b", batch=0)


# What came back


@pytest.mark.parametrize(
    ("went", "came", "reason"),
    [
        ("a dog sits here", "here sits a dog", None),
        ("two gray dogs", "a pair of gray dogs", "facts"),
        ("two gray dogs sit", "2 grey dogs are sitting", None),
        ("a red dog", "a green dog", "facts"),
        ("a red dog and a red cat", "a red dog and a cat", "facts"),
        ("a dog left of a cat", "a dog right of a cat", "facts"),
        ("a dog above a cat", "a dog below a cat", "facts"),
        ("a dog without a leash", "a dog with a leash", "facts"),
        ("there is no dog", "there isn't any dog", None),
        ("there is a dog", "there is not a dog", "facts"),
        ("a big dog runs", "a large dog is running", None),
        ("a wooden table", "a metal table", "facts"),
        ("A dog runs.", "a dog runs", "same"),
        ("Is it a photo?", "It is a photo.", "question"),
        ("a dog runs", "dog", "length"),
        ("a dog", "a dog a dog a dog a dog", "length"),
    ],
)
def test_only_what_says_the_same_is_used(went, came, reason):
    assert fault(went, came, frozenset()) == reason
    counts: Counter[str] = Counter()
    samples = [Texts("k", (went,), frozenset())]
    versions = back_translate(samples, lambda texts, seed: list(texts), lambda texts, seed: [came], 0, counts)
    assert versions == [[[went if reason else came]]]
    assert counts == {"texts": 1} | ({f"kept_for_{reason}": 1} if reason else {})


def test_a_word_of_an_answer_comes_back_or_the_text_is_not_used():
    assert fault("Is it a photo or a drawing?", "Is it a picture or a drawing?", frozenset({"photo"})) == "answers"
    assert fault("Is it a photo or a drawing?", "Is this a drawing or a photo?", frozenset({"photo"})) is None
    assert fault("Is it a drawing?", "Is this a drawing?", frozenset({"photo"})) is None


def test_texts_stay_with_their_samples():
    samples = [Texts("a", ("one dog runs", "x"), frozenset()), Texts("b", ("y", "a dog sits"), frozenset())]

    def there(texts, seed):
        return [None if len(text) == 1 else text for text in texts]

    def back(texts, seed):
        assert texts == ["one dog runs", "a dog sits"]
        return ["one dog is running", "a dog is sitting"]

    counts: Counter[str] = Counter()
    versions = back_translate(samples, there, back, 0, counts)
    assert versions == [[["one dog is running", "x"]], [["y", "a dog is sitting"]]]
    assert counts == {"texts": 4, "kept_for_untranslated": 2}
