"""`vlm data augment`: originals stay, what is added says the same, and no visual fact, answer or denial is touched."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from vlm.data_tools import synonyms
from vlm.data_tools.augment import Synonyms, augment, augmented
from vlm.data_tools.engines import LocalEngine
from vlm.data_tools.scene_language import caption, questions
from vlm.data_tools.scene_world import LEVELS, compose
from vlm.data_tools.scenes import make_scene
from vlm.data_tools.synonyms import Table, WordNet, article, plural, replace_words, thesauri, wordnet_is_installed
from vlm.errors import RunError, UsageError
from vlm.samples import parse_sample
from vlm.shards import Shards, ShardWriter
from vlm.wording import KINDS, facts, said_by, words

TABLE = Table()


def every(text: str, *, share: float = 1.0, keep: tuple[str, ...] = (), sources=(TABLE,)) -> set[str]:
    """All that a text becomes under many seeds."""
    return {replace_words(text, sources, Random(seed), share, frozenset(keep)) for seed in range(40)}


# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a sofa", {"a couch"}),
        ("Two sofas.", {"Two couches."}),
        ("A couch in a room", {"A sofa in a room"}),
        ("Sofas stand here", {"Sofas stand here"}),
        ("a photo of a dog", {"a photograph of a dog", "a picture of a dog", "an image of a dog"}),
        ("An airplane", {"A plane"}),
        ("two policemen in the street", {"two officers in the street"}),
        ("a man seated on a bench", {"a man sitting on a bench"}),
        ("THE BIKE IS HERE", {"THE BICYCLE IS HERE"}),
        ("a television on the wall", {"a TV on the wall"}),
        ("the big dog", {"the large dog"}),
        ("people wearing trousers", {"people wearing pants"}),
        ("a bike, a bike and a cat", {"a bicycle, a bicycle and a cat"}),
        ("the sofa isn't new", {"the couch isn't new"}),
    ],
)
def test_a_word_gives_way_to_its_synonyms(text, expected):
    assert every(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a picture on the wall",  # a painting, perhaps
        "the photo album",  # the first half of a compound
        "the crowd photo shoot",
        "people tidy the room",  # a verb
        "he is messy-haired",
        "they store the food",
        "a grinning",
        "the Big Apple",  # a name
        "a sofa beside a couch",  # both are there already
        "a room without a sofa",
        "there is no sofa, bike or cat here",
        "the man isn't seated on a sofa",
        "neither a sofa nor a bike",
        "a red circle left of two small wooden squares",
        "",
        "…",
    ],
)
def test_where_the_sentence_leaves_a_doubt_nothing_is_replaced(text):
    assert every(text) == {text}


def test_a_denial_ends_with_its_sentence():
    assert every("There is no cat. A sofa is here.") == {"There is no cat. A couch is here."}
    assert every("A sofa is here. There is no sofa.") == {"A sofa is here. There is no sofa."}


def test_words_of_an_answer_stay_and_so_do_their_plurals():
    text = "Is the photo on the sofa?"
    assert every(text, keep=("photo",)) == {"Is the photo on the couch?"}
    assert every("two sofas", keep=("sofa",)) == every("a sofa", keep=("sofas",)) - {"a sofa"} | {"two sofas"}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 1.0])
def test_no_more_than_a_share_of_the_words_changes(share):
    text = "a lady seated on a sofa near a bike and an elderly gentleman holding a photo of an airplane"
    for other in every(text, share=share):
        pairs = zip(words(text), words(other), strict=True)
        changed = [before[0] for before, after in pairs if before[0] != after[0]]
        assert len([word for word in changed if word not in ("a", "an")]) <= share * len(words(text))


def test_the_table_changes_no_fact_and_has_no_word_twice():
    lines = [
        line for line in Path(Table.__init__.__code__.co_filename).with_name("synonyms.tsv").read_text().splitlines()
    ]
    giving = [word for line in lines if line[0] != "#" for word in line.partition("\t")[2].partition(" > ")[0].split()]
    assert [word for word, times in Counter(giving).items() if times > 1] == []
    entries = list(TABLE)
    assert len(entries) > 400
    for word, entry in entries:
        assert entry.part in ("noun", "adjective", "participle") and entry.replacements
        assert all(said_by(other) == said_by(word) for other in entry.replacements), word


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_every_fact_of_the_drawn_scenes_stays(level):
    changed = 0
    for number in range(60):
        _, fields = make_scene(level, "train", 0, number)
        for text in (fields["caption"], *(one["question"] for one in fields["qa"])):
            other = replace_words(text, (TABLE,), Random(number), 0.5)
            assert facts(other, *KINDS) == facts(text, *KINDS)
            changed += other != text
    assert changed > 30


def test_articles_and_plurals():
    for word, expected in {"image": "an", "unicorn": "a", "hour": "an", "unusual": "an", "European": "a"}.items():
        assert article(word) == expected
    for word, expected in {
        "bench": "benches",
        "pony": "ponies",
        "toy": "toys",
        "fireman": "firemen",
        "child": "children",
    }.items():
        assert plural(word) == expected


# WordNet


@dataclass(frozen=True)
class Meaning:
    """A synset as nltk has it."""

    part: str
    names: tuple[tuple[str, int], ...] = field(default=())

    def pos(self) -> str:
        return self.part

    def lemmas(self) -> list[Lemma]:
        return [Lemma(name, count) for name, count in self.names]


@dataclass(frozen=True)
class Lemma:
    written: str
    counted: int

    def name(self) -> str:
        return self.written

    def count(self) -> int:
        return self.counted


class Corpus:
    """A WordNet of a few words."""

    meanings = (
        Meaning("n", (("attorney", 5), ("lawyer", 9), ("legal_adviser", 3), ("advocate", 0))),
        Meaning("n", (("bank", 9), ("depository", 1))),
        Meaning("n", (("bank", 4), ("riverside", 1))),
        Meaning("v", (("ramble", 2), ("amble", 1))),
        Meaning("s", (("gleeful", 2), ("merry", 3))),
        Meaning("n", (("carmine", 2), ("lacquer", 2))),
        Meaning("n", (("hall", 7), ("vestibule", 2))),
        Meaning("n", (("lobby", 3), ("hall", 4))),
    )

    def synsets(self, word: str) -> list[Meaning]:
        return [meaning for meaning in self.meanings if word.removesuffix("s") in dict(meaning.names)]


def test_wordnet_replaces_words_of_one_meaning_by_words_in_use():
    source = (WordNet(Corpus()),)
    assert every("a lawyer in a room", sources=source) == {"an attorney in a room"}
    assert every("a gleeful dog", sources=source) == {"a merry dog"}
    for text in ("a bank", "two lawyers", "a man ramble", "an advocate's room", "a lobby"):
        assert every(text, sources=source) == {text}
    assert every("a sofa and a lawyer", sources=(TABLE, *source)) == {"a couch and an attorney"}


@pytest.mark.parametrize("error", [ImportError, LookupError])
def test_wordnet_that_is_not_installed(monkeypatch, error):
    def missing(name):
        raise error

    monkeypatch.setattr(synonyms, "importlib", SimpleNamespace(import_module=missing))
    thesauri.cache_clear()
    assert not wordnet_is_installed()
    assert len(thesauri(False)) == 1
    with pytest.raises(error):
        thesauri(True)


# Samples


SAMPLES = {
    "full": {
        "caption": "A lady on a sofa",
        "qa": [
            {"question": "Is the lady on a bike?", "answer": "no", "type": "yes"},
            {"question": "Is it a photo or a painting?", "answers": ["photo", "a photo"]},
        ],
        "mine": [1, {"a": "sofa"}],
    },
    "single": {"question": "Who is on the sofa?", "answer": "the lady", "question_id": 7},
    "words": {"text": "A bike stands near a sofa."},
    "blocks": {"text": "A bike is here.", "documents": []},
    "talk": {"messages": [{"role": "user", "content": "A sofa?"}, {"role": "assistant", "content": "A bike."}]},
    "plain": {"caption": "a red circle"},
    "again": {"caption": "a sofa", "augmented": "synonyms", "original": "x"},
    "broken": {"caption": 3.5, "messages": "none"},
}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "in") as writer:
        for key, fields in SAMPLES.items():
            writer.write(key, {"png": b"not looked at", "json": json.dumps(fields).encode()})
        writer.write("a/said", {"0.jpg": b"0", "1.jpg": b"1", "txt": b"two bikes"})
        writer.write("both", {"png": b"p", "txt": b"old", "json": b'{"caption": "a sofa"}'})
    return tmp_path / "in" / "00000.tar"


def run(tar: Path, **options) -> tuple[dict[str, dict[str, bytes]], Counter[str]]:
    counts: Counter[str] = Counter()
    made = list(augmented(tar, Synonyms(**{"share": 1.0, **options}), counts))
    assert len({key for key, _ in made}) == len(made)
    return dict(made), counts


def fields_of(parts: dict[str, bytes]) -> dict:
    return json.loads(parts["json"])


def test_originals_stay_and_new_samples_are_marked(tar):
    made, counts = run(tar)
    stored = {entry.key: entry.read() for entry in Shards.open(tar).entries}
    assert {key: parts for key, parts in made.items() if key in stored} == stored
    new = {key: parts for key, parts in made.items() if key not in stored}
    assert set(new) == {"full-syn1", "single-syn1", "words-syn1", "a/said-syn1", "both-syn1"}
    for key, parts in new.items():
        original = key.removesuffix("-syn1")
        assert fields_of(parts)["augmented"] == "synonyms" and fields_of(parts)["original"] == original
        pictures = {name: data for name, data in stored[original].items() if name not in ("json", "txt")}
        assert pictures.items() <= parts.items()
        assert parse_sample(key, parts).images == parse_sample(original, stored[original]).images
    expected = {"originals": 10, "augmented": 5, "unchanged": 1, "already_augmented": 1, "unreadable": 1}
    assert {name: counts[name] for name in expected} == expected


def test_only_the_wording_changes(tar):
    made, _ = run(tar)
    full = fields_of(made["full-syn1"])
    assert full["caption"] == "A woman on a couch"
    assert full["qa"][0] == {"question": "Is the woman on a bicycle?", "answer": "no", "type": "yes"}
    assert full["qa"][1] == SAMPLES["full"]["qa"][1]
    assert full["mine"] == SAMPLES["full"]["mine"]
    single = fields_of(made["single-syn1"])
    assert (
        single["question"] == "Who is on the couch?" and single["answer"] == "the lady" and single["question_id"] == 7
    )
    assert fields_of(made["words-syn1"])["text"] in {"A bicycle stands near a couch.", "A bike stands near a couch."}
    assert made["a/said-syn1"]["txt"] == b"two bicycles"
    assert fields_of(made["both-syn1"])["caption"] == "a couch" and "txt" not in made["both-syn1"]


def test_a_null_caption_hides_none_beside_the_json(tmp_path):
    with ShardWriter(tmp_path / "in") as writer:
        writer.write("k", {"png": b"p", "txt": b"two bikes", "json": b'{"caption": null}'})
    made, _ = run(tmp_path / "in" / "00000.tar")
    assert parse_sample("k-syn1", made["k-syn1"]).caption == "two bicycles"


def test_shards_augmented_before_are_refused(tmp_path):
    """But not where the originals of what was added are gone."""
    words_of = {"a": "a red circle", "b": "a sofa", "c": "a bike"}
    with ShardWriter(tmp_path / "in") as writer:
        for key, text in words_of.items():
            writer.write(key, {"json": json.dumps({"caption": text}).encode()})
    augment(tmp_path / "in", tmp_path / "once", Synonyms(share=1.0), LocalEngine(1))
    with pytest.raises(UsageError) as refusal:
        augment(tmp_path / "once", tmp_path / "twice", Synonyms(share=1.0, seed=5), LocalEngine(1))
    assert str(refusal.value) == (
        "sample b-syn1: already augmented with synonyms; augment the original shards, synonyms with --copies N"
    )
    assert not (tmp_path / "twice").exists()
    with ShardWriter(tmp_path / "alone") as writer:
        for entry in Shards.open(tmp_path / "once").entries:
            if "syn" in entry.key:
                writer.write(entry.key, entry.read())
    counts = augment(tmp_path / "alone", tmp_path / "same", Synonyms(share=1.0), LocalEngine(1))
    assert counts["already_augmented"] == 2 and counts["augmented"] == 0


def test_copies_differ_and_the_same_seed_gives_the_same_bytes(tmp_path):
    with ShardWriter(tmp_path / "in") as writer:
        for number in range(200):
            writer.write(f"{number}", {"json": b'{"caption": "a photo of a sofa, a bike and a lady"}'})
    tar = tmp_path / "in" / "00000.tar"
    made, counts = run(tar, copies=3, share=0.2)
    assert 400 < counts["augmented"] <= 600
    captions = {key: fields_of(parts)["caption"] for key, parts in made.items()}
    for number in range(200):
        own = [text for key, text in captions.items() if key == f"{number}" or key.startswith(f"{number}-syn")]
        assert len(own) == len(set(own))
    assert len({captions[f"{number}-syn1"] for number in range(200)}) > 5
    assert run(tar, copies=3, share=0.2)[0] == made
    assert run(tar, copies=3, share=0.2, seed=1)[0] != made


def test_what_was_written_is_read_again(tar, tmp_path):
    made, _ = run(tar)
    made.pop("broken")
    with ShardWriter(tmp_path / "out") as writer:
        for key, parts in made.items():
            writer.write(key, parts)
    assert {sample.key for sample in Shards.open(tmp_path / "out")} == set(made)


def test_settings():
    assert pickle.loads(pickle.dumps(Synonyms(copies=2))) == Synonyms(copies=2)
    with pytest.raises(UsageError, match="share is 1.5 of the words"):
        Synonyms(share=1.5)
    with pytest.raises(UsageError, match="copies is 0; make at least 1"):
        Synonyms(copies=0)


def test_wordnet_asked_for_and_not_there_ends_the_run(tar, monkeypatch):
    def missing(with_wordnet):
        raise LookupError

    monkeypatch.setattr("vlm.data_tools.augment.thesauri", missing)
    with pytest.raises(RunError, match="WordNet: nltk or its data are not here; pip install nltk"):
        run(tar, wordnet=True)


def test_a_scene_and_its_words_are_the_same_world():
    """Answers of an augmented scene are those of the picture: nothing but generic words was replaced."""
    level = LEVELS["easy"]
    scene = compose(level, Random(0))
    said = [caption(level, scene, Random(0))]
    said += [one["question"] for one in questions(level, scene, level.train_questions, Random(0), False)]
    for text in said:
        for other in every(text):
            pairs = zip(words(text), words(other), strict=True)
            changed = {(a[0].lower(), b[0].lower()) for a, b in pairs if a[0].lower() != b[0].lower()}
            assert {a for a, _ in changed} <= {"object", "objects", "large", "image", "a", "an"}
