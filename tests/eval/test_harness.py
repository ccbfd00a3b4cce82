"""Other people's harnesses, on local data: what they score is what our own API says, and what their own models say."""

from __future__ import annotations

import importlib
import json
import math
import sys
from importlib.metadata import entry_points

import pytest
from PIL import ImageFile

import vlm
from vlm.api import user_turn
from vlm.errors import UsageError
from vlm.eval.harness import batch_of, decoding_of, opened, weigh, write
from vlm.processing import pictures_of
from vlm.saving import save

TEXTS = [
    "there is a red circle",
    "two dogs",
    "it is round and blue, and larger than the other one that lies to the left",
]
QUESTIONS = ["What colour is it?", "How many are there?", "Is it round?", "Where?"]
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def folder(make_model, make_processor, tmp_path_factory):
    """A saved tiny model."""
    folder = tmp_path_factory.mktemp("harness") / "model"
    save(make_model(gate_init=1.0), make_processor(), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """What our own API makes of it."""
    return vlm.load(folder, device="cpu")


@pytest.fixture(autouse=True)
def pillow_as_it_was(monkeypatch):
    """lmms-eval tells Pillow, for the whole process, to take truncated pictures for whole ones."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.fixture
def language():
    """The adapter to lm-evaluation-harness."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'vlm[lm-eval]'")
    return importlib.import_module("vlm.eval.harness.language")


@pytest.fixture
def lmms():
    """The adapter to lmms-eval."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; pip install 'vlm[lmms-eval]'")
    return importlib.import_module("vlm.eval.harness.lmms")


# What both share


@pytest.mark.parametrize(
    ("wanted", "options", "until"),
    [
        ({}, {"max_new_tokens": 256, "num_beams": 1}, []),
        ({"max_gen_toks": 3, "max_tokens": 9, "until": "."}, {"max_new_tokens": 3, "num_beams": 1}, ["."]),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"max_new_tokens": 256, "num_beams": 1}, []),
        ({"temperature": 0, "top_p": 0.9, "until": None}, {"max_new_tokens": 256, "num_beams": 1}, []),
        (
            {"do_sample": True, "top_k": 0, "top_p": 0.9},
            {"max_new_tokens": 256, "num_beams": 1, "temperature": 1.0, "top_k": None, "top_p": 0.9},
            [],
        ),
    ],
)
def test_generation_settings_are_ours(wanted, options, until):
    assert decoding_of(wanted) == (options, until)


def test_a_setting_without_meaning_is_named(caplog):
    decoding_of({"repetition_penalty": 2.0, "modality": "image", "temperature": 0.0})
    assert "modality, repetition_penalty" in caplog.text


def test_equal_settings_are_put_together_and_replies_keep_their_order():
    calls = []

    def put(prompts, **options):
        calls.append((prompts, options["max_new_tokens"]))
        return [f"{prompt}.b,c" for prompt in prompts]

    short, long = {"max_gen_toks": 2, "until": [",", "", "."]}, {"max_gen_toks": 5}
    assert write([("1", short), ("2", long), ("3", short)], put) == ["1", "2.b,c", "3"]
    assert calls == [(["1", "3"], 2), (["2"], 5)]


@pytest.mark.parametrize("size", ["auto", 0, -1, "auto:4", 1.5])
def test_a_batch_size_that_is_no_number(size):
    with pytest.raises(UsageError, match="batch_size is .*; give a whole number of at least 1"):
        batch_of(size)


def test_more_than_one_process_is_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2 and the harness adapters run in 1 process"):
        opened(str(folder), "cpu", "auto", None)


def test_an_encoder_is_refused(make_model, make_processor, tmp_path):
    save(make_model("bert"), make_processor(), tmp_path / "bert")
    with pytest.raises(UsageError, match="'bert' reads both ways and has no likelihoods"):
        opened(str(tmp_path / "bert"), "cpu", "auto", None)


def conversations(model, make_picture):
    """Replies to weigh: what the model itself says, and what it does not say."""
    asked = [user_turn([make_picture(place)] * (place % 3), text) for place, text in enumerate(QUESTIONS)]
    other = [[*turns, {"role": "assistant", "content": text}] for turns, text in zip(asked, TEXTS, strict=False)]
    return asked, other


def test_weights_are_the_apis(model, make_picture):
    _, told = conversations(model, make_picture)
    rows = [(*model.processor.encode_dialogue(turns), pictures_of(turns)) for turns in told]
    expected = [total for total, _ in model.loglikelihood(told)]
    for batch_size in (1, 2, 32):
        assert [total for total, _ in weigh(model, rows, batch_size)] == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_is_what_greedy_decoding_gives(model, make_picture):
    picture = make_picture(5)
    inputs = model.processor(images=[picture], text=["<image>Which?"])
    start = inputs["input_ids"].shape[1]
    ids = model.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    flags = [place >= start for place in range(len(ids))]
    wrong = [*ids[:-1], (ids[-1] + 1) % 250]
    rows = [(ids, flags, [picture]), (wrong, flags, [picture])]
    assert [likeliest for _, likeliest in weigh(model, rows, 2)] == [True, False]


def test_a_text_that_is_too_long(model):
    with pytest.raises(UsageError, match="the text has 300 tokens and the language model takes 256"):
        weigh(model, [([5] * 300, [True] * 300, [])], 1)


# lm-evaluation-harness


def requests(kind, arguments):
    """Instances as the harness makes them."""
    instance = importlib.import_module("lm_eval.api.instance").Instance
    return [instance(kind, {}, one, place) for place, one in enumerate(arguments)]


@pytest.fixture
def theirs(language, model):
    """The harness's own model over our language model, which without a picture is an ordinary one."""
    harness = importlib.import_module("lm_eval.models.huggingface")
    tokenizer = model.processor.tokenizer
    return harness.HFLM(pretrained=model.model.language_model, tokenizer=tokenizer, max_length=64, device="cpu")


@pytest.fixture
def ours(language, folder):
    """Ours, with the same window."""
    return language.TextModel(str(folder), device="cpu", batch_size="2", max_length=64)


def test_likelihoods_are_those_of_the_harness_own_model(ours, theirs):
    pairs = [(text, end) for text in [*TEXTS, "", "long " * 30, "a space "] for end in (" it", " a green square")]
    asked = requests("loglikelihood", pairs)
    mine, other = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [told for told, _ in mine] == pytest.approx([told for told, _ in other], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]


def test_rolling_likelihoods_are_those_of_the_harness_own_model(ours, theirs):
    asked = requests("loglikelihood_rolling", [(text * 3,) for text in TEXTS])
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)


def test_texts_are_those_of_the_harness_own_model(ours, theirs):
    settings = [{"max_gen_toks": 7, "until": ["."]}, {"max_gen_toks": 4, "until": ["q", "\n"]}]
    asked = requests("generate_until", [(text, dict(one)) for text in TEXTS for one in settings])
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_of_a_long_prompt_the_end_is_read(ours, model):
    text = "é" * 100 + "x"
    (reply,) = ours.generate_until(requests("generate_until", [(text, {"max_gen_toks": 10})]))
    assert reply == model.complete(text[-27:], max_new_tokens=10)  # é is 2 tokens, and half of one is none
    with pytest.raises(UsageError, match="max_gen_toks is 70 and max_length is 64; ask for fewer"):
        ours.generate_until(requests("generate_until", [(text, {"max_gen_toks": 70})]))


def test_a_greedy_continuation_is_known(ours, model):
    prompt = "there is"
    reply = model.complete(prompt, max_new_tokens=1)
    (told,) = ours.loglikelihood(requests("loglikelihood", [(prompt, reply)]))
    assert told[1] is True or "\ufffd" in reply


@pytest.mark.parametrize("length", [0, 256])
def test_a_window_that_does_not_fit(language, folder, length):
    with pytest.raises(UsageError, match=f"max_length is {length}; it must be at least 1 and at most 255"):
        language.TextModel(str(folder), device="cpu", max_length=length)


def test_a_task_of_lm_evaluation_harness(language, folder, model, tmp_path):
    file, cache = tmp_path / "texts.jsonl", str(tmp_path / "cache")
    said = model.complete(TEXTS, max_new_tokens=6)
    right = [said[0], "wrong", said[2]]
    lines = [{"text": text, "answer": answer} for text, answer in zip(TEXTS, right, strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": cache},
        "test_split": "test",
    }
    rolling = {
        **data,
        "task": "local_perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    written = {
        **data,
        "task": "local_answers",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": SETTINGS,
        "metric_list": [{"metric": "exact_match"}],
    }
    evaluator = importlib.import_module("lm_eval.evaluator")
    tasks = importlib.import_module("lm_eval.tasks")
    results = evaluator.simple_evaluate(
        model="vlm",
        model_args={"pretrained": str(folder), "device": "cpu"},
        tasks=[rolling, written],
        batch_size=2,
        task_manager=tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    told = sum(told for told, _ in model.loglikelihood_rolling(TEXTS))
    size = sum(len(text.encode()) for text in TEXTS)
    scores = results["results"]
    assert scores["local_perplexity"]["byte_perplexity,none"] == pytest.approx(math.exp(-told / size), rel=1e-5)
    assert scores["local_answers"]["exact_match,none"] == pytest.approx(2 / 3)
    samples = sorted(results["samples"]["local_answers"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == [text.partition("\n\n")[0] for text in said]


def test_the_command_of_lm_evaluation_harness(language, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--model", "vlm", "--tasks", "wikitext"])
    cli = importlib.import_module("lm_eval.__main__")

    def refused():
        language.opened(str(tmp_path / "nothing"), "cpu", "auto", None)

    monkeypatch.setattr(cli, "cli_evaluate", refused)
    with pytest.raises(SystemExit) as exit:
        language.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


# lmms-eval

DOCUMENTS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    told = (previous_round_info or 0) + 1
    return pictures(doc), f"{told}: you said {previous_output[-1]!r}. Sure?", round_idx == 3, previous_output, told

def rounds(doc, results):
    return {"rounds": len(results[0])}
"""
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
task: {task}
test_split: test
output_type: {kind}
doc_to_visual: !function documents.pictures
doc_to_text: !function documents.text
doc_to_target: answer
"""
WRITTEN = "generation_kwargs: {max_new_tokens: 6, do_sample: false, until: ['\\n\\n']}\n"
EXACT = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
ROUNDS = (
    "process_results: !function documents.rounds\n"
    "metric_list: [{metric: rounds, aggregation: mean, higher_is_better: true}]\n"
)
CHOICES = (
    "doc_to_choice: [a red one, two, 'yes', to the left]\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
)


@pytest.fixture
def asked(lmms, model, make_picture, tmp_path):
    """Pictures on disk with questions; three of four answers are the model's own. Gives conversations and replies."""
    for place in range(len(QUESTIONS)):
        make_picture(place).save(tmp_path / f"{place}.png")
    asked = [user_turn([tmp_path / f"{place}.png"], text) for place, text in enumerate(QUESTIONS)]
    replies = model.generate(asked, max_new_tokens=6)
    right = [*replies[:3], "something else"]
    rows = [
        {"picture": str(tmp_path / f"{place}.png"), "question": question, "answer": answer}
        for place, (question, answer) in enumerate(zip(QUESTIONS, right, strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "documents.py").write_text(DOCUMENTS)
    return asked, replies


def run(folder, tmp_path, kind, settings, **options):
    """The scores and the replies that the harness gives on the local task."""
    evaluator = importlib.import_module("lmms_eval.evaluator")
    tasks = importlib.import_module("lmms_eval.tasks")
    task = TASK.format(file=tmp_path / "rows.jsonl", cache=tmp_path / "cache", task=f"local_{kind}", kind=kind)
    (tmp_path / "task.yaml").write_text(task + settings)
    results = evaluator.simple_evaluate(
        model="vlm",
        model_args=f"pretrained={folder},device=cpu",
        tasks=[f"local_{kind}"],
        batch_size=3,
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    samples = sorted(results["samples"][f"local_{kind}"], key=lambda sample: sample["doc_id"])
    return results["results"][f"local_{kind}"], [sample["resps"] for sample in samples]


def test_lmms_eval_finds_the_model(lmms):
    (point,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "vlm"]
    assert point.load() is lmms.manifest
    models = importlib.import_module("lmms_eval.models")
    assert models.get_model("vlm") is lmms.ChatModel
    assert models.get_model("vlm", force_simple=True) is lmms.SimpleModel


@pytest.mark.parametrize("force_simple", [False, True])
def test_a_task_of_lmms_eval(asked, folder, tmp_path, force_simple):
    scores, replies = run(folder, tmp_path, "generate_until", WRITTEN + EXACT, force_simple=force_simple)
    assert [reply[0][0] for reply in replies] == asked[1]
    assert scores["exact_match,none"] == 0.75


@pytest.mark.parametrize("force_simple", [False, True])
def test_rounds_of_lmms_eval(asked, folder, tmp_path, monkeypatch, force_simple):
    def echo(self, conversations, **options):
        ((turn,),) = conversations
        assert [part["type"] for part in turn["content"]] == ["image", "text"]
        return [f"({turn['content'][1]['text']})"]

    monkeypatch.setattr(vlm.VLM, "generate", echo)
    scores, replies = run(folder, tmp_path, "generate_until_multi_round", WRITTEN + ROUNDS, force_simple=force_simple)
    assert scores["rounds,none"] == 3
    for question, reply in zip(QUESTIONS, replies, strict=True):
        expected = [f"({question})"]
        expected.append(f"(1: you said {expected[-1]!r}. Sure?)")
        expected.append(f"(2: you said {expected[-1]!r}. Sure?)")
        assert reply[0][0] == expected


def test_pictures_are_opened_as_they_are_needed(lmms, folder, make_picture, monkeypatch):
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    adapter = lmms.SimpleModel(str(folder), device="cpu", batch_size=2)
    adapter.task_dict = {"local": {"test": list(range(5))}}
    opened, seen = [], []

    def visuals(doc):
        opened.append(doc)
        return [make_picture(doc)]

    def count(self, conversations, **options):
        seen.append((len(conversations), len(opened)))
        return ["it"] * len(conversations)

    monkeypatch.setattr(vlm.VLM, "generate", count)
    about = {"task": "local", "doc_id": 0, "repeats": 1}
    arguments = [("What?", {"max_new_tokens": 2}, visuals, doc, "local", "test") for doc in range(5)]
    assert adapter.generate_until([instance("generate_until", one, 0, about) for one in arguments]) == ["it"] * 5
    assert seen == [(2, 2), (2, 4), (1, 5)]


def test_choices_of_lmms_eval(asked, folder, model, tmp_path):
    _, replies = run(folder, tmp_path, "multiple_choice", CHOICES, force_simple=True)
    for turns, reply in zip(asked[0], replies, strict=True):
        options = [" a red one", " two", " yes", " to the left"]
        told = model.loglikelihood([[*turns, {"role": "assistant", "content": option}] for option in options])
        losses = [float(one[0][0]) for one in reply]
        assert losses == pytest.approx([-total for total, _ in told], abs=1e-4)
        assert min(losses) == losses[max(range(4), key=lambda place: told[place][0])]


def test_likelihoods_of_lmms_eval_bear_the_sign_that_it_reads(lmms, asked, folder, model, tmp_path):
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    adapter = lmms.SimpleModel(str(folder), device="cpu")
    adapter.task_dict = {"local": {"test": [{"answer": "two"}]}}
    about = {"task": "local", "doc_id": 0, "repeats": 1}

    def told(target):
        arguments = ("How many?", target, lambda doc: [], 0, "local", "test")
        return adapter.loglikelihood([instance("loglikelihood", arguments, 0, about)])[0].text

    expected, _ = model.loglikelihood([[*user_turn([], "How many?"), {"role": "assistant", "content": "two"}]])[0]
    assert told("two")[0] == pytest.approx(-expected, abs=1e-4)
    assert told(lambda doc: doc["answer"])[0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UsageError, match="acc_mutual_info asks for choices without their question"):
        adapter.loglikelihood([instance("loglikelihood", ("", "two"), 0, about)])


def test_a_film_is_refused(lmms, folder):
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    adapter = lmms.ChatModel(str(folder), device="cpu")
    adapter.task_dict = {"local": {"test": [{}]}}
    turns = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "What?"}]}]
    arguments = ("", lambda doc: turns, {}, 0, "local", "test")
    asked = [instance("generate_until", arguments, 0, {"task": "local", "doc_id": 0, "repeats": 1})]
    with pytest.raises(UsageError, match="a part of type 'video'; this model takes text and pictures"):
        adapter.generate_until(asked)
