"""Packing: samples that share rows lose what they lose in rows of their own, and nothing passes between them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm
from vlm.cli import run
from vlm.data_tools.text import Cutting, chunk
from vlm.errors import UsageError
from vlm.losses import IGNORED
from vlm.samples import Question, Sample, plain_texts
from vlm.shards import Shards
from vlm.train.batches import READERS
from vlm.train.bench_packing import bench_packing
from vlm.train.config_stage import Stage
from vlm.train.objectives import OBJECTIVES, Plan
from vlm.train.packing import layout, tiles

TWO_WAYS = {
    "gemma3_text": {"sliding_window": 12},
    "mistral": {"sliding_window": 12},
    "modernbert": {"local_attention": 12},
}


# Which share a row


@pytest.mark.parametrize("most", [60, 100, 1000])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_example_stands_in_one_row_that_holds_it(count, most):
    for seed in range(30):
        lengths = np.random.default_rng([seed, count, most]).integers(1, 61, count).tolist()
        rows = layout(lengths, most)
        assert sorted(number for row in rows for number in row) == list(range(count))
        widest = max(sum(lengths[number] for number in row) for row in rows)
        assert widest <= most
        assert len(rows) * tiles(widest) <= count * tiles(max(lengths)), "no more padding than in rows of their own"
        assert layout(lengths, most) == rows


def test_short_captions_fill_their_rows():
    """Of 64 captions of 5 to 60 tokens, a tenth of the area is left over, and rows have about as many each."""
    lengths = np.random.default_rng(0).lognormal(np.log(12), 0.6, 64).clip(5, 60).astype(int).tolist()
    rows = layout(lengths, 1024)
    area = len(rows) * tiles(max(sum(lengths[number] for number in row) for row in rows))
    assert sum(lengths) > 0.88 * area and max(map(len, rows)) * len(rows) < 1.5 * len(lengths)


def test_equal_lengths_share_nothing():
    assert layout([64] * 8, 64) == [[number] for number in range(8)]


# The same losses


@pytest.fixture
def samples(make_picture) -> list[Sample]:
    """Text alone, one picture with several documents, two pictures, a question without any; short and long."""

    def encoded(seed: int) -> bytes:
        file = io.BytesIO()
        make_picture(seed).save(file, "PNG")
        return file.getvalue()

    hue, count = Question("which hue?", ("red",), "colour"), Question("how many?", ("two",), "count")
    places = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "same?"}]
    talk = ({"role": "user", "content": places}, {"role": "assistant", "content": "no"})
    greeting = ({"role": "assistant", "content": [{"type": "text", "text": "hello"}]},)
    blocks = {"documents": [{"characters": [0, 5]}, {"characters": [7, 18]}]}
    return [
        Sample("words", text="plain words that nobody needs a picture for"),
        Sample("one", (encoded(1),), "a picture", (hue, count), text="beside it"),
        Sample("two", (encoded(2), encoded(3)), messages=talk, text="two of them"),
        Sample("asked", questions=(count,), text="x"),
        Sample("greeted", (encoded(4),), "a last one", messages=greeting, text="a last one, rather long"),
        Sample("block", text="first\n\nand another", extra=blocks),
    ]


@pytest.fixture
def objective_of(make_text_config, make_model, make_processor):
    """An objective on a tiny model, and its readers: packed and not."""

    def make(name: str, family: str = "qwen3", attention: str = "sdpa", **stage):
        objective = OBJECTIVES[name](
            _model(make_model, make_text_config, family), Stage(objective=name, steps=1, **stage)
        )
        objective.model.set_attn_implementation(attention)
        causal = objective.model.config.reading == "causal"
        settings = [Stage(objective=name, steps=1, pack=pack, **stage) for pack in (True, False)]
        return objective, *(READERS[name](make_processor(), setting, 256, causal) for setting in settings)

    return make


def _model(make_model, make_text_config, family: str) -> vlm.VLMModel:
    if family not in TWO_WAYS:
        return make_model(family, gate_init=0.5)
    torch.manual_seed(0)
    config = make_model(family, gate_init=0.5).config
    settings = make_text_config(family).to_dict() | TWO_WAYS[family]
    config.text_config = type(make_text_config(family)).from_dict(settings)
    return vlm.VLMModel(config).eval()


def read(reader, samples: list[Sample]) -> list:
    return [reader.example(sample, np.random.default_rng(number)) for number, sample in enumerate(samples)]


def gradients(objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "language", "attention"),
    [
        *[("joint", family, "sdpa") for family in ("qwen3", "gpt2", "opt", "gemma3_text", "mistral", "qwen3_moe")],
        *[("clm", family, "sdpa") for family in ("qwen3", "gpt2", "xglm", "gemma3_text", "mistral")],
        *[("mlm", family, "sdpa") for family in ("llama", "bert", "roberta", "modernbert")],
        *[("joint", "qwen3", "eager"), ("clm", "gemma3_text", "eager"), ("mlm", "bert", "eager")],
    ],
)
def test_packed_equals_padded(objective_of, samples, name, language, attention):
    stage = {"mask_share": 0.5} if name == "mlm" else {"contrastive_weight": 0.3} if name == "joint" else {}
    objective, packs, pads = objective_of(name, language, attention, **stage)
    # Without the block, whose documents share a row in any case, text goes the language model's own way where it is padded.
    samples = samples if name == "joint" else samples[:5]
    packed, padded = packs.collate(read(packs, samples)), pads.collate(read(pads, samples))
    assert len(packed["input_ids"]) < len(padded["input_ids"]) == len(samples)
    assert ("document_ids" in padded) == (name == "joint")
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    targets = objective.targets(padded)
    assert objective.targets(packed) == targets > 20
    (loss, logs), (expected, said) = (objective(batch, Plan(targets)) for batch in (packed, padded))
    assert abs(float(loss) - float(expected)) < 1e-6 * abs(float(expected))
    assert all(torch.allclose(logs[key].float(), said[key].float(), rtol=1e-6, atol=1e-6) for key in said)
    found, wanted = gradients(objective, loss), gradients(objective, expected)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], value, rtol=1e-4, atol=1e-6) for key, value in wanted.items())


def test_the_order_in_a_row_does_not_matter(objective_of, samples):
    objective, packs, _ = objective_of("joint", max_tokens=1024)
    examples = read(packs, samples)
    targets = objective.targets(packs.collate(examples))
    losses = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(examples))
        batch = packs.collate([examples[number] for number in order])
        losses.append(float(objective(batch, Plan(targets))[0]))
    assert max(losses) - min(losses) < 1e-6 * losses[0] and losses[0] > 0


def logits_of(objective, batch: dict) -> Tensor:
    keys = ("position_ids", "document_ids", "token_image", "pixel_values", "image_slots")
    with torch.no_grad():
        return objective.model(batch["input_ids"], **{key: batch[key] for key in keys}).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("language", ["qwen3", "gemma3_text"])
def test_what_one_document_holds_no_other_sees(objective_of, samples, language, attention):
    objective, packs, _ = objective_of("joint", language, attention)
    batch = packs.collate(read(packs, samples))
    before = logits_of(objective, batch)
    assert int(batch["document_ids"].max()) > 3
    for row in range(len(batch["document_ids"])):
        for document in range(1, int(batch["document_ids"][row].max()) + 1):
            own = torch.zeros_like(batch["document_ids"], dtype=torch.bool)
            own[row] = batch["document_ids"][row] == document
            ids = torch.where(own & (batch["input_ids"] > 5), batch["input_ids"] ^ 1, batch["input_ids"])
            after = logits_of(objective, batch | {"input_ids": ids})
            assert torch.equal(after[~own], before[~own]) and not torch.equal(after[own], before[own])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_picture_is_seen_by_its_own_documents_alone(objective_of, samples, attention):
    objective, packs, _ = objective_of("joint", attention=attention)
    batch = packs.collate(read(packs, samples))
    before = logits_of(objective, batch)
    slots, seen, documents = batch["image_slots"], batch["token_image"], batch["document_ids"]
    assert slots.shape[1] > 1 and sorted(slots[slots >= 0].tolist()) == list(range(len(batch["pixel_values"])))
    own = torch.where(seen >= 0, slots.gather(1, seen.clamp(min=0)), -1)
    for picture in range(len(batch["pixel_values"])):
        pixels = batch["pixel_values"].clone()
        pixels[picture] = pixels[picture].flip(-1)
        after = logits_of(objective, batch | {"pixel_values": pixels})
        # Within a document the text behind a picture is read on; to every other document it is not there.
        reached = torch.stack([torch.isin(row, row[own[number] == picture]) for number, row in enumerate(documents)])
        assert torch.equal(after[~reached], before[~reached]) and not reached.all()
        assert (after[own == picture] != before[own == picture]).any(-1).all()


# Text alone


def test_text_alone_is_learnt_whole_and_sees_no_picture(objective_of, samples):
    _, packs, _ = objective_of("joint")
    words, block = (read(packs, [sample])[0] for sample in (samples[0], samples[5]))
    assert np.all(words.token_image == -1) and words.pixels is None and words.types == [None]
    assert words.labels[0] == IGNORED and np.array_equal(words.labels[1:], words.ids[1:])
    assert packs.processor.tokenizer.decode(words.ids) == samples[0].text + "<eos>"
    said = {packs.processor.tokenizer.decode(block.ids[block.documents == number]) for number in (1, 2)}
    assert said == {"first<eos>", "and another<eos>"}
    caption = read(packs, [Sample("beside", caption="a caption without a picture")])[0]
    assert packs.processor.tokenizer.decode(caption.ids) == "a caption without a picture<eos>"
    with pytest.raises(UsageError, match="sample a has no caption, question or messages"):
        read(packs, [Sample("a", samples[1].images, text="words beside a picture say nothing of it")])


def test_blocks_of_text_are_kept_apart_by_document(objective_of, make_tokenizer, tmp_path):
    """As `vlm data text` writes them; each document loses what it loses alone."""
    lines = [f"document {number} " + "is short. " * (number % 3) for number in range(9)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chunk([tmp_path / "lines.jsonl"], tmp_path / "text", Cutting(str(tmp_path / "tokenizer"), 80, 0))
    shards = Shards.open(tmp_path / "text")
    blocks = [shards[number] for number in range(len(shards))]
    assert len(blocks) < len(lines)
    assert all(ends for block in blocks for _, ends in plain_texts(block))
    told = [text for block in blocks for text, _ in plain_texts(block)]
    assert told == [line.rstrip() for line in lines]
    objective, packs, pads = objective_of("clm")
    whole = packs.collate(read(packs, blocks))
    alone = [pads.collate(read(pads, [Sample("a", text=text)])) for text in told]
    assert all("document_ids" not in batch for batch in alone), "a document to itself goes the model's own way"
    assert objective.targets(whole) == sum(map(objective.targets, alone))
    losses = sum(float(objective(batch, Plan(1.0))[0]) for batch in alone)
    assert abs(float(objective(whole, Plan(1.0))[0]) - losses) < 1e-5 * losses


def test_blocks_that_cannot_be_are_refused(objective_of, samples):
    _, packs, _ = objective_of("clm", max_tokens=16)
    with pytest.raises(UsageError, match="block has 2 documents of 18 tokens together, more than 16; raise max_tokens"):
        read(packs, [samples[5]])
    for place in ([3, 99], [5, 5], [-1, 3], ["a", "b"], 7):
        broken = Sample("a", text="some words", extra={"documents": [{"characters": place}]})
        with pytest.raises(
            UsageError, match=r"sample a: characters .* of a document, text has 10; write \[first, last\]"
        ):
            read(packs, [broken])
    other = Sample("a", text="words", extra={"documents": ["of", {"another": "kind"}]})
    assert plain_texts(other) == (("words", True),)


def test_a_long_text_ends_where_it_ends(objective_of, make_tokenizer, tmp_path):
    """Not at the end of every block: a model that learnt so would stop in the middle of a sentence."""
    (tmp_path / "long.txt").write_text("There is more of this to come. " * 12)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chunk([tmp_path / "long.txt"], tmp_path / "text", Cutting(str(tmp_path / "tokenizer"), 80, 0))
    shards = Shards.open(tmp_path / "text")
    _, packs, _ = objective_of("clm", max_tokens=81)
    examples = read(packs, [shards[number] for number in range(len(shards))])
    assert len(examples) > 3
    eos = packs.processor.tokenizer.eos_token_id
    assert [eos in example.ids for example in examples] == [False] * (len(examples) - 1) + [True]


# The benchmark


def test_the_benchmark_measures_both_sides_and_their_losses():
    rows = bench_packing(batch=2, rounds=1, depth=2, width=64)
    speeds = [row for row in rows if row.unit == "token/s"]
    assert len(speeds) == 4 and all(row.ours > 0 and row.peer > 0 for row in speeds)
    assert "area 1.00 × smaller" in speeds[-1].conditions, "texts of one length share no row"
    losses = [row for row in rows if row.unit == "relative"]
    assert len(losses) == 2 and all(row.ours <= 1e-4 for row in losses)


def test_the_benchmark_names_what_it_knows(capsys):
    assert run(["bench", "train", "--against", "nobody"]) == 2
    assert "there is no nobody to measure against; use one of" in capsys.readouterr().err
