"""`vlm data text`: no block is too long or blank, and without their overlaps the blocks are the source, byte for byte."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from vlm.data_tools import text as text_tool
from vlm.data_tools.text import Cutting, blocks, plan, restore
from vlm.data_tools.text_cutting import Cutter
from vlm.errors import RunError, UsageError
from vlm.shards import Shards, ShardWriter
from vlm.train.tokenizer import as_transformers, train_bpe

WORDS = "a the small red dog cat sat on mat and saw two birds over big old house near long river bank again".split()
SCRAPS = [
    *"aZ .!?,;\n\t",
    "\r\n",
    "\n\n",
    "  ",
    "é",
    "e\u0301",
    "漢字。",
    "👩‍👩‍👧",
    "🇩🇪",
    "\u200b",
    "<eos>",
    "<image>",
    "x" * 70,
    "Mr. ",
]


def prose(rng: random.Random, sentences: int, end: str = "\n") -> str:
    """Sentences of four to fourteen words, a line break after some."""
    return "".join(
        " ".join(rng.choices(WORDS, k=rng.randint(4, 14))).capitalize() + rng.choice([". ", "! ", "?" + end])
        for _ in range(sentences)
    )


def scraps(rng: random.Random, number: int) -> str:
    """Anything that text may hold: marks, emoji, blanks, control tokens, long words, stray characters."""
    drawn = [chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(number)]
    return "".join(rng.choice([rng.choice(SCRAPS), rng.choice(WORDS) + " ", one]) for one in drawn)


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerBase:
    return as_transformers(train_bpe(iter([prose(random.Random(0), 300)]), 400), 10_000)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def cut_up(saved):
    """Every block of some files, in order; the numbers are added to `counts`."""

    def cut(*files: Path, length: int = 32, overlap: int = 8, counts: Counter | None = None) -> list[dict]:
        pieces = enumerate(plan(files))
        counts = Counter() if counts is None else counts
        made = [
            one for number, piece in pieces for one in blocks(number, piece, Cutting(saved, length, overlap), counts)
        ]
        assert len({key for key, _ in made}) == len(made)
        return [json.loads(parts["json"]) for _, parts in made]

    return cut


@pytest.fixture
def file(tmp_path: Path):
    def write(data: str | bytes, name: str = "a.txt") -> Path:
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return tmp_path / name

    return write


# One text


@pytest.mark.parametrize("seed", range(40))
def test_any_text_comes_back_and_no_part_is_too_long(tokenizer, seed):
    rng = random.Random(seed)
    text = scraps(rng, rng.randrange(400))
    length = rng.choice([16, 17, 23, 40, 64, 200, 600])
    overlap = rng.choice([0, 1, length // 8, length // 2, length - 1])
    parts = list(Cutter(tokenizer, length, overlap).parts(text))
    assert "".join(part.before + part.text[part.overlap :] + part.after for part in parts) == (text if parts else "")
    assert parts or not text.strip("\ufeff").strip()
    starts = [part.start for part in parts]
    assert starts == sorted(set(starts))
    for part in parts:
        assert text.startswith(part.text, part.start) and part.text == part.text.strip()
        assert count(tokenizer, part.text) <= part.tokens <= length
        assert len(part.text) > part.overlap


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_a_length_of_few_tokens(tokenizer, length):
    text = prose(random.Random(1), 3)
    parts = list(Cutter(tokenizer, length, length - 1).parts(text))
    assert "".join(part.text[part.overlap :] + part.after for part in parts) == text
    assert all(count(tokenizer, part.text) <= length for part in parts)


def test_a_character_that_does_not_fit_is_an_error(tokenizer):
    with pytest.raises(UsageError, match="'😀' has 4 tokens, length is 3; raise the length"):
        list(Cutter(tokenizer, 3, 1).parts("so 😀"))


def test_graphemes_stay_whole(tokenizer):
    text = "e\u0301👩‍👩‍👧🇩🇪" * 200
    for part in Cutter(tokenizer, 64, 16).parts(text):
        assert part.text.startswith(("e", "👩‍👩‍👧", "🇩")) and part.text.endswith(("\u0301", "👧", "🇪"))


def test_cuts_are_ends_of_sentences_and_overlaps_are_about_as_long_as_asked(tokenizer):
    text = prose(random.Random(2), 600)
    parts = list(Cutter(tokenizer, 128, 24).parts(text))
    assert len(parts) > 20
    assert all(part.text[-1] in ".!?" for part in parts)
    for part in parts[1:]:
        assert 12 <= count(tokenizer, part.text[: part.overlap]) <= 26
        assert text[part.start - 1].isspace()
    assert all(part.tokens >= 96 for part in parts[:-1])


def test_abbreviations_end_no_sentence(tokenizer):
    text = "the dog saw Mr. Smith and e.g. Dr. J. Smith near it. The cat sat on mat and saw birds over the house again"
    first, *_ = Cutter(tokenizer, 40, 0).parts(text)
    assert first.text.endswith("near it.")


def test_a_control_token_in_the_text_counts_as_training_reads_it(tokenizer, make_processor):
    processor = make_processor(tokenizer)
    for part in Cutter(tokenizer, 20, 4).parts("<eos><image> " * 50):
        assert count(tokenizer, processor.plain(part.text)) <= 20


def test_tokenizers_that_drop_and_change_text(tokenizer):
    """WordPiece on lower-cased text without accents, whose words break anew where they are cut."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([prose(random.Random(0), 100)], trainer)
    pieces = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    for seed in range(5):
        text = scraps(random.Random(seed), 300)
        parts = list(Cutter(pieces, 30, 10).parts(text))
        assert "".join(part.before + part.text[part.overlap :] + part.after for part in parts) == text
        assert all(count(pieces, part.text) <= 30 for part in parts)


@pytest.mark.parametrize(("length", "overlap"), [(8, 8), (8, 9), (8, -1), (0, 0)])
def test_an_overlap_that_leaves_no_room_is_refused(tokenizer, length, overlap):
    with pytest.raises(UsageError, match=f"overlap {overlap} of length {length} tokens; give"):
        Cutter(tokenizer, length, overlap)


# Files


@pytest.mark.parametrize("window", [1 << 20, 50, 400])
@pytest.mark.parametrize("seed", range(6))
def test_files_come_back_byte_for_byte(cut_up, file, monkeypatch, window, seed):
    monkeypatch.setattr(text_tool, "WINDOW", window)
    monkeypatch.setattr(text_tool, "_SEARCH", min(window, 100))
    monkeypatch.setattr(text_tool, "PIECE", 3 * window)
    rng = random.Random(seed)
    sources = {
        "prose.txt": prose(rng, 60, rng.choice(["\n", "\r\n", "\r"])),
        "bom.txt": "\ufeff" + rng.choice(["", "\r\n "]) + prose(rng, rng.choice([1, 40])) + rng.choice(["", "\n"]),
        "scraps.txt": "x" + scraps(rng, 500),
        "long.txt": "w" * 700,
        "gap.txt": "\n" * 300 + "one" + " \u3000\n" * 500 + "two\n\n",
    }
    files = [file(text, name) for name, text in sources.items()]
    found = cut_up(*files, length=40, overlap=10)
    assert restore(found) == {str(path): path.read_bytes() for path in files}
    assert all(block["text"] == block["text"].strip() for block in found)
    rng.shuffle(found)
    assert restore(found) == {str(path): path.read_bytes() for path in files}


def test_windows_of_a_file_overlap_too(cut_up, file, monkeypatch, tokenizer):
    monkeypatch.setattr(text_tool, "WINDOW", 1000)
    found = cut_up(file(prose(random.Random(3), 200)), length=64, overlap=16)
    shared = [block["text"][: block["documents"][0]["overlap"]] for block in found]
    assert not shared[0] and all(8 <= count(tokenizer, text) <= 18 for text in shared[1:])


def test_json_lines_come_back_and_are_packed(cut_up, file, monkeypatch, tokenizer):
    monkeypatch.setattr(text_tool, "WINDOW", 500)
    rng = random.Random(4)
    texts = [prose(rng, rng.choice([1, 1, 1, 2, 20])) for _ in range(80)]
    texts[5], texts[9] = " \n", "\ufeff marked "
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = file("\ufeff" + "\n".join(lines), "a.jsonl")
    counts: Counter[str] = Counter()
    found = cut_up(path, length=48, overlap=8, counts=counts)
    assert list(restore(found).values()) == [text.encode() for text in texts if text.strip()]
    assert counts["documents"] == 80 and counts["blank"] == 1 and counts["blocks"] == len(found)
    assert max(len(block["documents"]) for block in found) > 1
    for block in found:
        assert count(tokenizer, block["text"]) <= 48
        ranges = [document["characters"] for document in block["documents"]]
        assert block["text"] == "\n\n".join(block["text"][first:last] for first, last in ranges)
    assert counts["tokens"] == sum(count(tokenizer, block["text"]) for block in found)
    long = [name for name, text in restore(found).items() if count(tokenizer, text.decode()) > 60]
    assert long
    for name in long:
        alone = [block["documents"] for block in found if block["documents"][0]["name"] == name]
        assert all(len(documents) == 1 for documents in alone[:-1])


def test_small_files_share_blocks(cut_up, file):
    files = [file(f"File {number}.\n", f"{number}.txt") for number in range(6)]
    found = cut_up(*files, length=64)
    assert len(found) < 6 and restore(found) == {str(path): path.read_bytes() for path in files}


def test_blocks_are_samples(cut_up, file, tmp_path):
    source = file(prose(random.Random(5), 40))
    found = cut_up(source)
    with ShardWriter(tmp_path / "out") as writer:
        for number, block in enumerate(found):
            writer.write(f"{number:04d}", {"json": json.dumps(block).encode()})
    shards = Shards.open(tmp_path / "out")
    assert [sample.text for sample in shards] == [block["text"] for block in found]
    assert restore(sample.extra | {"text": sample.text} for sample in shards) == {str(source): source.read_bytes()}


def test_a_missing_block_is_named(cut_up, file):
    found = cut_up(file(prose(random.Random(6), 40)))
    for gone in (0, 3):
        with pytest.raises(RunError, match=r"document .*a.txt: a block ends at byte \d+, the next begins at \d+"):
            restore(found[:gone] + found[gone + 1 :])


def test_files_without_a_letter(cut_up, file):
    counts: Counter[str] = Counter()
    with pytest.raises(UsageError, match="a.txt: no text in there"):
        plan([file("")])
    assert cut_up(file(""), file("word", "b.txt"), file(" \n\r\n", "c.txt"), file("\ufeff", "d.txt"), counts=counts)
    assert counts == {"documents": 3, "blank": 2, "blocks": 1, "tokens": counts["tokens"]}


@pytest.mark.parametrize("window", [1 << 20, 64])
def test_what_is_not_utf8_is_named_with_its_byte(cut_up, file, monkeypatch, window):
    monkeypatch.setattr(text_tool, "WINDOW", window)
    data = (prose(random.Random(7), 20).encode() + b"caf\xe9 again")[:-1]
    place = data.index(b"\xe9")
    with pytest.raises(UsageError, match=f"a.txt: byte {place} is 0xe9, no UTF-8; save the file as UTF-8"):
        cut_up(file(data))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", 'no "text" that is a string'),
        ('{"text": 3}', 'no "text" that is a string'),
        ('{"text": "a"', "Expecting"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "can't decode byte 0xff in position 10"),
    ],
)
def test_a_faulty_line_is_named(cut_up, file, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(UsageError, match=rf"a.jsonl line 3: .*{reason}.*; write one"):
        cut_up(file(b'{"text": "good"}\n\n' + line + b"\n", "a.jsonl"))


def test_a_file_that_is_missing_or_named_twice_is_refused(file, tmp_path):
    with pytest.raises(UsageError, match="none.txt: No such file or directory; check"):
        plan([tmp_path / "none.txt"])
    path = file("a")
    with pytest.raises(UsageError, match="a.txt: given twice"):
        plan([path, path])


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="tokenizer .*none: can not be loaded"):
        Cutting(str(tmp_path / "none")).cutter()
