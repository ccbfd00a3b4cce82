"""`vlm data inspect`: every number is right, whatever the shards, and a report stays small."""

from __future__ import annotations

import io
import json
import pickle
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shard_files import fields, png, write_set, write_tar
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlm.cli import run
from vlm.data_tools.inspect import Found, Histogram, Report, Tally, inspect, inspect_shard
from vlm.errors import UsageError
from vlm.shards import ShardWriter


def test_everything_is_counted(shards: Path) -> None:
    report = inspect(shards)
    assert report.faults == [] and (report.shards, report.samples, report.distinct_captions) == (2, 4, 1)
    assert report.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert report.holding == {"images": 3, "caption": 2, "questions": 2, "messages": 1, "text": 1}
    assert report.images_per_sample.places == {0: 1, 1: 2, 2: 1}
    assert report.widths.places == {8: 3, 20: 1} and report.heights.places == {6: 4}
    assert {kind: dict(lengths.places) for kind, lengths in report.words.items()} == {
        "caption": {3: 2}, "question": {4: 2, 1: 1}, "answer": {1: 2, 3: 1}, "conversation": {2: 1}, "text": {5: 1}
    }  # fmt: skip
    named = {kind: dict(tally.named) for kind, tally in report.answers.items()}
    assert named == {"colour": {"red": 1, "blue": 1}, "untyped": {"not at all": 1}}


def test_the_rows_say_it_in_words(shards: Path) -> None:
    rows = dict(inspect(shards).rows())
    assert rows["samples"] == "4" and rows["  with images"] == "3" and rows["faults"] == "0"
    assert rows["images per sample"] == "1 (from 0 to 2)"
    assert rows["width × height"] == "8 (from 8 to 20) × 6 (from 6 to 6)"
    assert rows["questions: colour"] == "2: red 50.0%, blue 50.0%"


def test_the_table_is_printed_and_a_sound_set_is_exit_0(shards: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["data", "inspect", str(shards)]) == 0
    out, err = capsys.readouterr()
    printed = [" ".join(line.strip("│ ").replace("│", "").split()) for line in out.splitlines()]
    assert {"samples 4", "with caption 2", "distinct captions 1", "faults 0"} <= set(printed) and err == ""


@pytest.mark.parametrize("source", ["00000.tar", "{00000..00001}.tar"])
def test_a_tar_or_a_range_of_them_needs_no_index(shards: Path, source: str) -> None:
    (shards / "index.json").unlink()
    report = inspect(shards / source)
    assert report.faults == [] and report.samples == (2 if source == "00000.tar" else 4)


def test_data_is_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answer = {"question": "q", "answer": "[bold]loud[/nonsense]", "type": "[red]"}
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", {"json": fields(**answer)})
    assert run(["data", "inspect", str(tmp_path / "set")]) == 0
    assert "[bold]loud[/nonsense] 100.0%" in capsys.readouterr().out


# Numbers against lists


WORDS = "a red kite over the beach with two dogs".split()


def random_samples(number: int, seed: int) -> dict[str, dict[str, bytes]]:
    """Samples of all kinds; captions, types and answers repeat now and then."""
    rng = np.random.default_rng(seed)
    samples = {}
    for index in range(number):
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(6)]
        asked = [{"question": f"{texts[n]}?", "answer": texts[n].split()[0], "type": "ab"[n % 2]} for n in (3, 4, 5)]
        told = [{"role": "user", "content": texts[1]}, {"role": "assistant", "content": texts[2]}]
        kinds: list[dict[str, Any]] = [
            {"caption": texts[0], "qa": asked[: rng.integers(4)], "augmented": "synonyms"},
            {"captions": texts[:3]},
            {"messages": told},
            {"text": " ".join(texts)},
        ]
        kind = int(rng.integers(4))
        sizes = rng.integers(3, 18, (rng.integers(1, 4) if kind < 2 else 0, 2))
        images = {f"{n}.png": png(index, (int(w), int(h))) for n, (w, h) in enumerate(sizes)}
        samples[f"{index:04d}"] = images | {"json": fields(**kinds[kind])}
    return samples


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A tokenizer to whom every word is a token, and who would put two special tokens around a text."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=4)
    assert len(fast("two words")["input_ids"]) == 4
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def assert_counts(histogram: Histogram, values: list[int]) -> None:
    assert histogram.places == Counter(values)
    assert (histogram.count, histogram.total, histogram.mean) == (len(values), sum(values), statistics.fmean(values))
    assert (histogram.least, histogram.most, histogram.median) == (min(values), max(values), statistics.median(values))


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_of_a_plain_computation(seed: int, tmp_path: Path) -> None:
    samples = random_samples(61, seed)
    report = inspect(write_set(tmp_path / "set", samples, 8))
    stored = [json.loads(parts["json"]) for parts in samples.values()]
    pictures = [[Image.open(io.BytesIO(parts[name])) for name in parts if name != "json"] for parts in samples.values()]
    assert_counts(report.images_per_sample, [len(some) for some in pictures])
    assert_counts(report.bytes_per_sample, [sum(map(len, parts.values())) for parts in samples.values()])
    assert_counts(report.widths, [picture.width for some in pictures for picture in some])
    assert_counts(report.heights, [picture.height for some in pictures for picture in some])
    captions = [
        text
        for one in stored
        for text in dict.fromkeys([*filter(None, [one.get("caption")]), *one.get("captions", [])])
    ]
    asked = [question for one in stored for question in one.get("qa", [])]
    texts = {
        "caption": captions,
        "question": [one["question"] for one in asked],
        "answer": [one["answer"] for one in asked],
        "conversation": [" ".join(m["content"] for m in one["messages"]) for one in stored if "messages" in one],
        "text": [one["text"] for one in stored if "text" in one],
    }
    for kind, some in texts.items():
        assert_counts(report.words[kind], [len(text.split()) for text in some])
    assert report.distinct_captions == len(set(captions)) < len(captions)
    assert report.augmented == sum("augmented" in one for one in stored) > 0
    for kind in "ab":
        assert report.answers[kind].named == Counter(one["answer"] for one in asked if one["type"] == kind)


def test_tokens_are_counted_without_special_tokens(counting: Path, tmp_path: Path) -> None:
    report = inspect(write_set(tmp_path / "set", random_samples(40, 9), 7), tokenizer=str(counting))
    assert report.tokens == report.words and set(report.tokens) >= {"caption", "question", "answer", "conversation"}
    assert "tokens: caption" in dict(report.rows()) and report.as_dict()["tokenizer"] == str(counting)


def test_a_tokenizer_that_is_none_is_refused_in_one_line(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    for name in (tmp_path / "damaged", tmp_path / "missing"):
        with pytest.raises(UsageError, match="; give a Hugging Face id or a folder$") as refusal:
            inspect(shards, tokenizer=str(name))
        assert str(refusal.value).startswith(f"tokenizer {name}: ") and "\n" not in str(refusal.value)


def test_what_is_merged_is_what_is_found_at_once(tmp_path: Path) -> None:
    samples = random_samples(50, 5)
    whole, parted = (inspect(write_set(tmp_path / str(size), samples, size)) for size in (50, 6))
    assert (whole.shards, parted.shards) == (1, 9)
    place = ("path", "shards", "bytes")
    assert [{k: v for k, v in report.as_dict().items() if k not in place} for report in (whole, parted)] == [
        {k: v for k, v in whole.as_dict().items() if k not in place}
    ] * 2
    assert [(chance, entry.key) for chance, entry in whole.drawn] == [(c, entry.key) for c, entry in parted.drawn]
    assert len(whole.drawn) == 36


def test_everything_is_plain_json(shards: Path) -> None:
    values = inspect(shards).as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["with"] == {"images": 3, "caption": 2, "questions": 2, "messages": 1, "text": 1}
    assert values["images_per_sample"] == {
        "count": 4, "min": 0, "max": 2, "mean": 1.0, "median": 1.0, "bins": [[0, 1, 1], [1, 2, 2], [2, 3, 1]]
    }  # fmt: skip
    assert values["questions"]["colour"] == {"count": 2, "answers": {"red": 1, "blue": 1}, "others": 0}


# Bounded memory


def test_large_numbers_are_counted_nearly_and_their_mean_exactly() -> None:
    rng = np.random.default_rng(0)
    values = [int(value) for value in np.exp(rng.normal(9, 2.5, 20_001))]
    parts = [Histogram() for _ in range(3)]
    for place, value in enumerate(values):
        parts[place % 3].add(value)
    whole = Histogram()
    for part in parts:
        whole.merge(part)
    assert (whole.count, whole.total, whole.least, whole.most) == (20_001, sum(values), min(values), max(values))
    for rank in (0, 17, 5_000, 10_000, 19_990, 20_000):
        true = sorted(values)[rank]
        assert true * (1 - 1 / 2048) <= whole.at(rank) <= true
    assert len(whole.places) <= 4096 + 2048 * (max(values).bit_length() - 12)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3, 2.5])
@pytest.mark.parametrize("middle", [0.5, 30, 4e5])
def test_bins_hold_every_number_once(spread: float, middle: float) -> None:
    values = [int(value) for value in middle * np.exp(np.random.default_rng(1).normal(0, spread, 3000))]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    bins = histogram.bins()
    assert len(bins) <= 38 and sum(count for _, _, count in bins) == 3000
    assert bins[0][0] <= min(values) and max(values) < bins[-1][1]
    assert all(one[1] == other[0] for one, other in zip(bins, bins[1:], strict=False))
    assert len({below - low for low, below, _ in bins[:-1]}) <= 1
    if max(values) < 4096:
        assert [count for _, _, count in bins] == [
            sum(low <= value < below for value in values) for low, below, _ in bins
        ]


def test_nothing_counted_is_said_so() -> None:
    nothing = Histogram()
    assert str(nothing) == "none" and nothing.bins() == [] and nothing.as_dict()["mean"] == 0
    nothing.merge(Histogram())
    assert nothing == Histogram()


def test_rare_answers_are_put_together_and_frequent_ones_stay() -> None:
    parts = [Tally() for _ in range(4)]
    for part, tally in enumerate(parts):
        for number in range(3000):
            tally.add("yes" if number % 3 == 0 else f"only once {part} {number}" + "e" * 1000)
    whole = Tally()
    for tally in parts:
        whole.merge(tally)
    assert whole.total == 12_000 and whole.named["yes"] == 4000 and whole.others > 6000
    assert len(whole.named) <= 1000 and max(map(len, whole.named)) == 80
    assert str(whole).startswith("12,000: yes 33.3%, ") and str(whole).endswith("% rare ones")


def test_types_beyond_a_hundred_share_a_place(tmp_path: Path) -> None:
    samples = {f"{n}": {"json": fields(question="q", answer="x", type=f"type {n}")} for n in range(150)}
    for per_shard in (150, 11):
        report = inspect(write_set(tmp_path / str(per_shard), samples, per_shard))
        assert len(report.answers) == 101 and report.answers["type 99"].total == 1
        assert report.answers["other types"].named == {"x": 50}


def test_a_report_grows_by_two_hashes_a_sample(tmp_path: Path) -> None:
    """Every caption, question, answer, length and fault another: what is stated to grow is all that grows."""

    def size(number: int) -> int:
        rng = np.random.default_rng(0)
        samples = {
            f"{n}": {
                "json": fields(caption=f"caption {n} " + "x " * int(rng.integers(200)), question=f"{n}?", answer=f"{n}")
            }
            | ({"png": b"broken"} if n % 2 == 0 else {})
            for n in range(number)
        }
        report = inspect(write_set(tmp_path / str(number), samples, 1000))
        assert report.fault_count == number // 2 and report.distinct_captions == number
        return len(pickle.dumps(report))

    small, large = size(3_000), size(11_000)
    assert 16 * 8_000 <= large - small <= 16 * 8_000 + 20_000


def test_a_shard_alone_is_a_report_of_it(shards: Path) -> None:
    parts = [inspect_shard(Found(tar)) for tar in sorted(shards.glob("*.tar"))]
    whole = Report(str(shards))
    for part in parts:
        whole.merge(part)
    assert [part.samples for part in parts] == [2, 2] and whole == inspect(shards)
    assert pickle.loads(pickle.dumps(parts[0])) == parts[0]


def test_halves_of_surrogate_pairs_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = b'{"caption": "half \\ud83d", "question": "\\ud83d?", "answer": "\\ud83d", "type": "\\ud83d"}'
    write_tar(tmp_path / "x.tar", {"a.json": broken})
    assert run(["data", "inspect", str(tmp_path / "x.tar")]) == 0
    assert "questions: ?" in capsys.readouterr().out
