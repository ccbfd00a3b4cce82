"""Batches: what each objective is given of a sample, and which samples stand in which micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm.errors import UsageError
from vlm.losses import IGNORED
from vlm.samples import Sample
from vlm.shards import Shards
from vlm.train.batches import READERS, MicroBatches, padded, stream
from vlm.train.config_stage import Stage
from vlm.train.order import Order

TALK = [
    {"role": "user", "content": [{"type": "text", "text": "before "}, {"type": "image"}]},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and?"}]},
    {"role": "assistant", "content": "second"},
]
ASSISTANT_SAYS = {"a picture<eos>", "two<eos>", "red<eos>"}


@pytest.fixture(scope="module")
def samples(make_shards, tmp_path_factory) -> Shards:
    """A caption with questions, a conversation about two pictures, a conversation without any, and text."""
    fields = {
        "full": {
            "pictures": 1,
            "caption": "a picture",
            "qa": [{"question": "how many?", "answer": "two", "type": "count"}, {"question": "hue?", "answer": "red"}],
        },
        "talk": {"pictures": 2, "messages": TALK},
        "blind": {"question": "you?", "answer": "I", "text": "plain"},
        "text": {"text": "only words"},
        "asked": {"pictures": 1, "question": "what?", "answers": ["dog", "cat", "cat"]},
    }
    return Shards.open(make_shards(tmp_path_factory.mktemp("batches") / "set", fields))


def sample(samples: Shards, key: str) -> Sample:
    return samples[samples.keys.index(key)]


@pytest.fixture
def reader(make_processor):
    """A reader for one objective, with whatever else the stage says."""

    def make(objective: str, longest: int = 256, predicts_next: bool = True, **stage):
        settings = Stage.model_validate({"objective": objective, "steps": 1, **stage})
        return READERS[objective](make_processor(), settings, longest, predicts_next)

    return make


def read(reader, sample: Sample, seed: int = 0):
    return reader.example(sample, np.random.default_rng(seed))


def spoken(reader, ids, chosen) -> str:
    return reader.processor.tokenizer.decode(np.asarray(ids)[np.asarray(chosen)])


# joint


def test_only_what_the_assistant_says_is_labelled(reader, samples):
    joint = reader("joint")
    example = read(joint, sample(samples, "full"))
    said = {
        spoken(joint, example.ids, (example.documents == document) & (example.labels != IGNORED))
        for document in (1, 2, 3)
    }
    assert said == ASSISTANT_SAYS
    labelled = example.labels != IGNORED
    assert np.array_equal(example.labels[labelled], example.ids[labelled])
    talk = read(joint, sample(samples, "talk"))
    assert spoken(joint, talk.ids, talk.labels != IGNORED) == "first<eos>second<eos>"


def test_documents_of_a_row_have_their_own_numbers_positions_and_pictures(reader, samples):
    joint = reader("joint")
    example = read(joint, sample(samples, "full"))
    assert sorted(set(example.documents)) == [1, 2, 3] and np.all(np.diff(example.documents) >= 0)
    for document in (1, 2, 3):
        chosen = example.documents == document
        assert np.array_equal(example.positions[chosen], np.arange(chosen.sum()))
        ids, seen = example.ids[chosen], example.token_image[chosen]
        place = int(np.flatnonzero(ids == joint.processor.image_token_id)[0])
        assert np.all(seen[:place] == -1) and np.all(seen[place:] == 0), "each document has the picture to itself"


def test_a_token_sees_the_last_picture_before_it(reader, samples):
    joint = reader("joint")
    talk = read(joint, sample(samples, "talk"))
    assert sorted(set(talk.token_image)) == [-1, 0, 1]
    assert spoken(joint, talk.ids, talk.token_image == 1) == "<image>and?<|assistant|>second<eos>"
    assert talk.pixels.shape == (2, 3, 32, 32)


def test_documents_come_in_another_order_at_another_visit(reader, samples):
    joint = reader("joint")
    orders = {tuple(read(joint, sample(samples, "full"), seed).ids) for seed in range(20)}
    assert len(orders) == 6


def test_at_most_so_many_questions_drawn_anew(reader, samples):
    joint = reader("joint", questions=1)
    visits = [read(joint, sample(samples, "full"), seed) for seed in range(20)]
    assert all(sum(kind is not None for kind in visit.types) == 1 for visit in visits)
    assert all(len(visit.types) == 2 for visit in visits), "the caption does not count"
    assert {kind for visit in visits for kind in visit.types if kind} == {"count", "untyped"}


def test_what_is_not_drawn_is_not_encoded(reader, samples, monkeypatch):
    joint, encoded = reader("joint", questions=1), []
    encode = joint.processor.encode_dialogue
    monkeypatch.setattr(joint.processor, "encode_dialogue", lambda said: encoded.append(said) or encode(said))
    example = read(joint, sample(samples, "full"))
    assert len(encoded) == example.documents[-1] == 2, "the caption and one of two questions"


def test_types_stand_in_the_order_of_the_documents(reader, samples):
    joint = reader("joint")
    example = read(joint, sample(samples, "full"), seed=3)
    kinds = {"a picture<eos>": None, "two<eos>": "count", "red<eos>": "untyped"}
    for document, kind in enumerate(example.types, start=1):
        said = spoken(joint, example.ids, (example.documents == document) & (example.labels != IGNORED))
        assert kinds[said] == kind


def test_a_joint_batch_lays_rows_and_pictures_side_by_side(reader, samples):
    joint = reader("joint", pack=False)
    examples = [read(joint, sample(samples, key)) for key in ("talk", "blind", "full")]
    batch = joint.collate(examples)
    assert batch["image_slots"].tolist() == [[0, 1], [-1, -1], [2, -1]]
    assert torch.equal(batch["pixel_values"], torch.cat([examples[0].pixels, examples[2].pixels]))
    assert batch["input_ids"].shape[1] % 8 == 0
    for row, example in enumerate(examples):
        length = len(example.ids)
        wanted = {
            "input_ids": (example.ids, 0),
            "labels": (example.labels, IGNORED),
            "position_ids": (example.positions, 0),
            "document_ids": (example.documents, 0),
            "token_image": (example.token_image, -1),
        }
        for name, (values, filler) in wanted.items():
            assert np.array_equal(batch[name][row, :length], values)
            assert torch.all(batch[name][row, length:] == filler)


def test_a_batch_without_pictures_has_a_zero_picture_that_nobody_sees(reader, samples):
    joint = reader("joint")
    batch = joint.collate([read(joint, sample(samples, "blind"))])
    assert torch.equal(batch["pixel_values"], torch.zeros(1, 3, 32, 32))
    assert batch["image_slots"].tolist() == [[-1]] and torch.all(batch["token_image"] == -1)


def test_documents_that_do_not_fit_wait_for_another_visit(reader, samples):
    joint = reader("joint", max_tokens=40)
    visits = [read(joint, sample(samples, "full"), seed) for seed in range(20)]
    assert all(len(visit.ids) <= 40 and not visit.faults for visit in visits)
    said = {spoken(joint, visit.ids, visit.labels != IGNORED) for visit in visits}
    assert all(any(text in row for row in said) for text in ASSISTANT_SAYS)


def test_a_document_longer_than_a_row_is_told_and_left_out(reader, samples):
    joint = reader("joint", max_tokens=20)
    example = read(joint, sample(samples, "full"))
    assert spoken(joint, example.ids, example.labels != IGNORED) in ("two<eos>", "red<eos>")
    assert example.faults == ["a document of 34 tokens is longer than 20; raise max_tokens"]
    with pytest.raises(UsageError, match="sample talk: a document of 30 tokens is longer than 20; raise max_tokens"):
        read(joint, sample(samples, "talk"))


def test_positions_of_the_model_limit_a_document(reader, samples):
    with pytest.raises(UsageError, match="longer than 8"):
        read(reader("joint", longest=8), sample(samples, "full"))


def test_pairs_of_a_joint_batch_point_at_their_pictures(reader, samples):
    joint = reader("joint", contrastive_weight=0.5)
    batch = joint.collate([read(joint, sample(samples, key)) for key in ("talk", "blind", "full", "asked")])
    assert batch["pair_images"].tolist() == [2, 3], "the first pictures of the two samples that have a text for theirs"
    texts = joint.processor.tokenizer.batch_decode(batch["pair_input_ids"], skip_special_tokens=True)
    assert texts == ["a picture", "what? cat"]
    assert torch.equal(batch["pair_attention_mask"], (batch["pair_input_ids"] != 0).long())
    batch = joint.collate([read(joint, sample(samples, "blind"))])
    assert batch["pair_images"].tolist() == [] and batch["pair_attention_mask"].sum() == 1, "a text for no picture"


# contrastive, clm, mlm


def test_pairs_of_picture_and_text(reader, samples):
    contrastive = reader("contrastive")
    examples = [read(contrastive, sample(samples, key)) for key in ("full", "asked")]
    batch = contrastive.collate(examples)
    texts = contrastive.processor.tokenizer.batch_decode(batch["input_ids"])
    assert [text.replace("<pad>", "") for text in texts] == ["a picture<eos>", "what? cat<eos>"]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["attention_mask"].sum(1).tolist() == [len(example.ids) for example in examples]
    for key, words in (("text", "has no picture"), ("talk", "has no caption or question")):
        with pytest.raises(UsageError, match=f"sample {key} {words}"):
            read(contrastive, sample(samples, key))


def test_text_only_reads_the_text_else_what_goes_with_the_picture(reader, samples):
    clm = reader("clm")
    texts = [clm.processor.tokenizer.decode(read(clm, sample(samples, key)).ids) for key in ("text", "blind", "full")]
    assert texts == ["only words<eos>", "plain<eos>", "a picture<eos>"]
    batch = reader("clm", pack=False).collate([read(clm, sample(samples, key)) for key in ("text", "blind")])
    asked = batch["attention_mask"].bool()
    asked[:, 0] = False
    assert torch.equal(batch["labels"][asked], batch["input_ids"][asked])
    assert torch.all(batch["labels"][~asked] == IGNORED), "nothing stands before the first token to predict it from"
    with pytest.raises(UsageError, match="has a text of 11 tokens, more than 10; cut it up"):
        read(reader("clm", max_tokens=10), sample(samples, "text"))


def test_control_tokens_in_a_text_are_words(reader):
    clm = reader("clm")
    ids = read(clm, Sample("a", text="<eos><image>b<mask>")).ids
    assert {*ids[:-1]}.isdisjoint(clm.processor.tokenizer.all_special_ids) and ids[-1] == 1


def test_mlm_hides_eighty_ten_ten(reader):
    mlm = reader("mlm", max_tokens=100_000, longest=100_000, mask_share=0.3)
    words = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 60_000)))
    plain = mlm.processor.tokenizer.encode(words + "<eos>")
    example = read(mlm, Sample("a", text=words))
    chosen = example.labels != IGNORED
    count = int(chosen.sum())
    assert np.array_equal(example.labels[chosen], np.asarray(plain)[chosen])
    assert np.array_equal(example.ids[~chosen], np.asarray(plain)[~chosen])
    hidden = int((example.ids[chosen] == mlm.processor.mask_token_id).sum())
    kept = int((example.ids[chosen] == example.labels[chosen]).sum())
    random = count - hidden - kept
    ordinary = len(mlm.processor.tokenizer) - len(mlm.processor.tokenizer.all_special_ids)
    for found, of, share in (
        (count, len(words), 0.3),
        (hidden, count, 0.8),
        (kept, count, 0.1 + 0.1 / ordinary),
        (random, count, 0.1 * (1 - 1 / ordinary)),
    ):
        assert abs(found - of * share) < 5 * np.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("predicts_next", [True, False])
def test_mlm_leaves_special_tokens_alone(reader, predicts_next):
    mlm = reader("mlm", mask_share=0.9, predicts_next=predicts_next)
    examples = [read(mlm, Sample("a", text="some words"), seed) for seed in range(200)]
    labels = np.concatenate([example.labels for example in examples])
    ids = np.concatenate([example.ids for example in examples])
    special = set(mlm.processor.tokenizer.all_special_ids)
    assert special.isdisjoint(labels), "eos is never asked for"
    assert (special - {mlm.processor.mask_token_id, 1}).isdisjoint(ids), "and none is ever put in but <mask>"
    firsts = {int(example.labels[0]) for example in examples}
    assert (firsts == {IGNORED}) == predicts_next, "nothing stands before the first token to predict it from"


def test_mlm_hides_other_tokens_at_another_visit(reader):
    mlm = reader("mlm")
    visits = [tuple(read(mlm, Sample("a", text="some words to be hidden"), seed).labels) for seed in (0, 0, 1)]
    assert visits[0] == visits[1] != visits[2]


def test_rows_are_padded_to_whole_tiles():
    assert padded([np.arange(3), np.arange(17)], -1).shape == (2, 24)
    assert padded([np.arange(3)], -1).tolist() == [[0, 1, 2] + [-1] * 5]
    assert padded([], 0).shape == (0, 8)


# Micro-batches


@pytest.fixture
def batches(reader, pairs):
    """Micro-batches of `pairs`, or of other shards, for a rank."""

    def make(*sources: str, objective: str = "joint", size: int = 3, rank: int = 0, ranks: int = 1) -> MicroBatches:
        opened = [Shards.open(source) for source in sources or (pairs,)]
        order = Order([len(shards) for shards in opened], [1.0] * len(opened), [0, 0])
        return MicroBatches(opened, order, reader(objective), size, rank, ranks)

    return make


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(
        torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name] for name in one
    )


@pytest.mark.parametrize("objective", ["joint", "mlm"])
def test_a_micro_batch_is_a_function_of_its_number(batches, objective):
    first, second = batches(objective=objective), batches(objective=objective)
    walked = [first[number] for number in range(6)]
    assert all(same(second[number], walked[number]) for number in (5, 0, 3, 3))
    assert not torch.equal(walked[0]["input_ids"], walked[4]["input_ids"]), "the second epoch is not the first"


def test_workers_change_nothing(batches):
    alone, helped = stream(batches(), 2, workers=0), stream(batches(), 2, workers=2)
    assert all(same(next(alone), next(helped)) for _ in range(5))


def test_workers_leave_the_global_random_state_alone(batches):
    before = torch.random.get_rng_state()
    next(stream(batches(), 0, workers=2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_ranks_together_see_what_one_rank_sees(batches):
    alone = [batches(objective="clm", size=6)[number]["input_ids"] for number in range(3)]
    for number, rows in enumerate(alone):
        split = [batches(objective="clm", size=2, rank=rank, ranks=3)[number]["input_ids"] for rank in range(3)]
        assert torch.equal(torch.cat(split), rows)


def test_samples_and_tokens_are_counted(batches):
    batch = batches()[0]
    assert batch["samples"] == 3 and batch["tokens"] == int((batch["document_ids"] > 0).sum())


def test_a_broken_sample_gives_way_to_the_next_and_is_told(batches, make_shards, tmp_path):
    fields = {
        "a": {"pictures": 1, "caption": "good"},
        "b": {"bytes": b"no picture", "caption": "bad"},
        "c": {"text": "nothing to look at"},
        "d": {"pictures": 1, "caption": "good as well"},
    }
    data = batches(make_shards(tmp_path / "set", fields), objective="contrastive", size=4)
    batch = data[0]
    texts = data.reader.processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert len(texts) == 4 and set(texts) == {"good", "good as well"}
    told = dict(batch["skipped"])
    assert told.keys() == {"b", "c"} and "has no picture" in told["c"]
    assert batch["samples"] == 4


def test_a_document_that_is_left_out_is_told(batches, make_shards, tmp_path):
    long = {"pictures": 1, "caption": "good", "question": "?" * 300, "answer": "x"}
    batch = batches(make_shards(tmp_path / "set", {"a": long}), size=1)[0]
    assert [key for key, _ in batch["skipped"]] == ["a"] and "is longer than 256" in batch["skipped"][0][1]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_holds_nothing_is_an_error(batches, make_shards, tmp_path, workers):
    source = make_shards(tmp_path / "set", {"a": {"text": "x"}, "b": {"text": "y"}})
    with pytest.raises(
        UsageError, match=f"none of 2 samples of {source} can be used by objective contrastive; the last: "
    ):
        next(stream(batches(source, objective="contrastive"), 0, workers))


def test_a_broken_sample_gives_way_within_its_own_source(batches, pairs, make_shards, tmp_path):
    own = make_shards(tmp_path / "set", {"x": {"text": "-"}, "y": {"pictures": 1, "caption": "mine"}})
    data = batches(pairs, own, objective="contrastive", size=1)
    texts = set()
    for position in range(40):
        if data.order.at(position)[0] == 1:
            texts |= set(data.reader.processor.tokenizer.batch_decode(data[position]["input_ids"], True))
    assert texts == {"mine"}
