"""Clients that mean harm by words: each is refused in OpenAI's form, costs little, and leaves the server as it was."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import random
import threading
import time

import numpy as np
import pytest
import torch

from vlm.processing import control_tokens

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.usefixtures("unharmed")


# Words


def control_words(model) -> list[str]:
    return sorted({*control_tokens(model.processor.tokenizer), "<image>", "<|user|>", "<|assistant|>", "<|im_end|>"})


def seen(model, ids: list[int]) -> list[int]:
    """The control tokens among them."""
    control = set(control_tokens(model.processor.tokenizer).values())
    return [id_ for id_ in ids if id_ in control]


def halves(text: str, at: int) -> tuple[str, str]:
    return text[:at], text[at:]


@pytest.fixture
def prompts_seen(server, monkeypatch):
    """The tokens of every prompt that reaches the engine."""
    prompts: list[list[int]] = []
    engine = server.service.worker._engine
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda prompt, decoding: prompts.append(prompt.ids) or add(prompt, decoding))
    return prompts


def test_control_tokens_are_words_when_a_client_says_them(server, model, prompts_seen):
    """Every one of them, broken over parts, doubled and mixed by chance; in every role."""
    words, chance = control_words(model), random.Random(0)
    assert len(words) >= 6
    said = [*words, *(word * 2 for word in words), *(word[:2] + word + word[2:] for word in words)]
    for _ in range(60):
        cut = [piece for word in chance.sample(words, 3) for piece in halves(word, chance.randrange(len(word)))]
        said.append("".join(chance.choice([*words, *cut, "<", ">", "|", "a", " ", "\u200b"]) for _ in range(8)))
    for text in said:
        at = chance.randrange(len(text))
        parts = [{"type": "text", "text": text[:at]}, {"type": "text", "text": text[at:]}]
        for content in (text, parts):
            messages = [
                {"role": "system", "content": content},
                {"role": "user", "content": content},
                {"role": "assistant", "content": content},
                {"role": "user", "content": content},
            ]
            prompts_seen.clear()
            answer = server.post(CHAT, {"messages": messages, "max_tokens": 1})
            plain = [{**message, "content": "a"} for message in messages]
            assert answer.status == 200 or answer.error["code"] == "context_length_exceeded", (text, answer.body)
            if answer.status == 200:
                assert seen(model, prompts_seen[0]) == seen(model, model.prompt(plain).ids), (text, content)
    for text in words:
        prompts_seen.clear()
        assert server.post("/v1/completions", {"prompt": text, "max_tokens": 1}).status == 200
        assert seen(model, prompts_seen[0]) == []
        assert server.post("/v1/embeddings", {"input": text}).status == 200


def test_a_picture_between_two_halves_of_a_control_token_stays_one(
    server, model, prompts_seen, make_picture, image_part
):
    part = image_part(make_picture(0))
    for word in control_words(model):
        content = [{"type": "text", "text": word[:3]}, part, {"type": "text", "text": word[3:]}]
        assert server.chat(content).status == 200
        turn = [
            {"type": "text", "text": "a"},
            {"type": "image", "image": make_picture(0)},
            {"type": "text", "text": "a"},
        ]
        assert seen(model, prompts_seen[-1]) == seen(model, model.prompt([{"role": "user", "content": turn}]).ids)


def test_any_characters_may_be_said(server):
    chance, codes = random.Random(1), [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(40):
        text = "".join(map(chr, chance.choices(codes, k=20)))
        assert server.chat(text).status in (200, 400)
    for text in (
        "\0",
        "\ufffe",
        "\u202e",
        "👩‍👩‍👧",
        "e\u0301" * 30,
        " " * 50 + "a",
        "\r\n\t.",
        "{{ 7 * 7 }}",
        "{% raw %}",
    ):
        assert server.chat(text).status == 200, text
    for text in ("", "   ", "\n"):
        assert server.chat(text).status == 400


# JSON


def test_what_is_no_request_is_refused(server):
    deep = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bodies = [
        b"", b"{", b"}", b"null", b"[]", b"1", b'"a"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{'messages': []}", b"{}", deep,
        b'{"a":' * 100_000, b'{"messages": NaN}', b'{"temperature": Infinity}', b'{"temperature": 1e999}', b"[" * 1_000_000,
        b'{"n": ' + b"9" * 100_000 + b"}", b'{"messages": "\xed\xa0\x80"}', b'{"messages": "\\ud800"}', b'{"\\udfff": 1}',
        b"{" + b",".join(b'"k%d": 0' % n for n in range(50_000)) + b"}", b"[" + b"0," * 900_000 + b"0]", b"\0" * 1000,
        b'{"messages": [{"role": "user", "content": "a", "content": 1}]}', random.Random(0).randbytes(100_000),
    ]  # fmt: skip
    for body, route in itertools.product(bodies, (CHAT, "/v1/completions", "/v1/embeddings")):
        begun = time.monotonic()
        answer = server.send(route, body)
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error", body[:40]
        assert time.monotonic() - begun < 10


WRONG = {
    "messages": [None, {}, "Hi", [], [[]], [1], [{}], [{"role": "user"}], [{"role": "robot", "content": "a"}],
                 [{"role": "user", "content": None}], [{"role": "user", "content": {"type": "text", "text": "a"}}],
                 [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "a", "name": "b"}],
                 [{"role": "assistant", "content": "a"}], [{"role": "user", "content": []}],
                 [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
                 [{"role": ["user"], "content": "a"}], [{"role": "user", "content": [{"type": {}, "text": "a"}]}]],
    "max_tokens": [0, -1, 1.5, "5", True, []],
    "temperature": [-0.1, 2.1, "1", True, [], 10**400],
    "top_p": [0, -1, 1.1, "1", 1e400],
    "top_k": [-2, 1.5, "5", 10**20],
    "min_p": [-1, 1.1],
    "repetition_penalty": [0, -1, 1000, 1e-300],
    "seed": [1.5, "a", 2**63, -(2**63) - 1, True],
    "n": [0, -1, 1.5, "2", 10**9, 129],
    "stop": [1, [1], ["a"] * 5, "", [""], "a" * 201, {}],
    "stream": ["true", 1, {}],
    "stream_options": [1, {"include_usage": 1}, {"more": 1}],
    "model": [1, "another", ["tiny"], ""],
    "presence_penalty": [1, -0.5, "0"],
    "logprobs": [True, 1],
    "tools": [[], None],
    "response_format": [{"type": "json_object"}],
    "logit_bias": [{}],
    "functions": [[]],
    "x" * 10_000: [1],
    "\u2028\u202e": [1],
}  # fmt: skip


def test_wrong_types_and_unknown_fields_are_refused_by_name(server):
    for field, values in WRONG.items():
        for value in values:
            told = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, field: value}
            answer = server.send(CHAT, json.dumps(told).encode())
            assert answer.status == (404 if value == "another" or value == "" and field == "model" else 400), (
                field,
                value,
            )
            if value not in (10**400, 1e400):  # no JSON that anybody could read
                assert answer.error["param"].startswith(field[:90]), (field, value, answer.error)
            assert len(answer.body) < 2000
    assert server.post("/v1/completions", {"prompt": [1, 2, 3]}).error["param"].startswith("prompt")
    assert server.post("/v1/completions", {"prompt": []}).error["param"] == "prompt"
    assert server.post("/v1/completions", {"prompt": "a", "suffix": "b"}).error["code"] == "unknown_parameter"
    assert server.post("/v1/embeddings", {"input": [[1]]}).error["param"].startswith("input")
    assert server.post("/v1/embeddings", {}).error["code"] == "missing_required_parameter"


def test_other_requests_are_refused_in_the_same_form(server):
    assert server.send("/nowhere").error and server.send("/nowhere").status == 404
    assert server.send("/../../etc/passwd").status == 404
    assert server.send(CHAT).status == 405 and server.send(CHAT).error
    assert server.send(CHAT, b"{}", method="DELETE").status == 405
    assert server.send(CHAT, b"{}", content_type="text/plain").status == 415
    assert server.send(CHAT, b"a=b", content_type="application/x-www-form-urlencoded").error
    assert server.send("/health", b"{}").status == 405
    assert 'vlm_requests_total{route="other"' in server.send("/metrics").body.decode()
    assert "nowhere" not in server.send("/metrics").body.decode()


# Health and logs


def test_health_is_told_within_a_second_whatever_comes(server, made_bombs, image_part, make_picture):
    """Eight clients that do their worst at once."""
    stop = threading.Event()
    heavy = [
        json.dumps({"messages": [{"role": "user", "content": [image_part(data)]}]}).encode()
        for data in made_bombs.values()
    ]
    heavy += [b"[" * 1_900_000, b"[" + b"0," * 900_000 + b"0]", b'{"messages": "' + b"<|" * 900_000 + b'"}']
    heavy += [json.dumps({"prompt": ["<|" * 60] * 16, "max_tokens": 120}).encode(), b"\0" * 1_900_000]
    heavy = [body for body in heavy if len(body) < 2_000_000]

    def harm(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            server.send(chance.choice((CHAT, "/v1/completions", "/v1/embeddings")), chance.choice(heavy))

    threads = [threading.Thread(target=harm, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    for _ in range(20):
        begun = time.monotonic()
        assert server.send("/health").status == 200
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert slowest < 1


def test_nothing_that_was_sent_is_logged(server, make_picture, image_part, caplog, capfd):
    """Whether it is answered, refused by any of the parts, or makes one of them fail."""
    caplog.set_level(logging.DEBUG)
    part = image_part(make_picture(5))
    data = part["image_url"]["url"].partition(",")[2]
    text = {"type": "text", "text": "Hi"}
    assert server.chat([part, text]).status == 200
    for content in (
        [{**part, "more": data}],
        [{"type": data, "text": "a"}],
        [{"type": "image_url", "image_url": {"url": data}}],
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + data[:-9]}}],
        [{"type": "text", "text": {"a": data}}],
        {"image": data},
    ):
        assert server.chat(content).status == 400
    server.send(CHAT, b'{"messages": ["' + data.encode() + b'"')
    server.chat("Hi", **{data[:300]: 1})
    # What a client is told of its own picture is short, and what is logged has nothing of it.
    written = caplog.text + "".join(capfd.readouterr())
    raw_bytes = base64.b64decode(data)
    for place in range(0, len(data) - 24, 24):
        assert data[place : place + 24] not in written
    for place in range(0, len(raw_bytes) - 16, 16):
        assert repr(raw_bytes[place : place + 16])[2:-1] not in written


def test_numbers_at_the_edge_do_no_harm_to_others(server):
    """What makes NaN of a row's probabilities would end the engine for everybody."""
    for more in (
        {"temperature": 5e-324}, {"temperature": 1e-45}, {"temperature": 2, "top_p": 5e-324}, {"min_p": 1.0, "temperature": 2},
        {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"temperature": 1e-45, "repetition_penalty": 100},
        {"temperature": 1e-45, "repetition_penalty": 0.01, "top_k": 2**31 - 1, "top_p": 1e-45, "min_p": 1},
    ):  # fmt: skip
        assert server.chat("Hi", **{"temperature": 1, "max_tokens": 20, **more}).status == 200, more
    assert torch.isfinite(torch.tensor(np.float64(server.metric("vlm_cache_bytes"))))
