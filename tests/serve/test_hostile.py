"""Clients that mean harm: each is refused in OpenAI's form, costs little, and leaves the server as it was."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import random
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from vlm.processing import control_tokens

CHAT = "/v1/chat/completions"
MEGABYTES = 50


@pytest.fixture(autouse=True)
def unharmed(server, caplog) -> Iterator[None]:
    """Whatever a test did to the server, it is healthy afterwards, and no failure was logged."""
    yield
    server.healthy()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


# Addresses


CONNECTIONS: list[object] = []
WATCHING = threading.Event()


def _watch(event: str, arguments: tuple) -> None:
    if WATCHING.is_set() and event in ("socket.connect", "socket.getaddrinfo", "open"):
        CONNECTIONS.append((event, threading.current_thread().name, arguments))


sys.addaudithook(_watch)


@pytest.fixture
def trap() -> Iterator[socket.socket]:
    """A port of this machine that nobody may come to, over IPv4 or IPv6."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
        listening.settimeout(0)
        yield listening


def addresses(port: int, file: Path) -> list[str]:
    """Where a picture may not be taken from."""
    hosts = [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "2130706433",
        "0x7f.1",
        "127.1",
        "[::]",
    ]
    hosts += ["10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]", "user@127.0.0.1"]
    urls = [f"{scheme}://{host}:{port}/a.png" for scheme in ("http", "https", "HTTP", "ftp") for host in hosts]
    urls += [
        f"http://127.0.0.1:{port}/redirect?to=file:///etc/passwd",
        f"//127.0.0.1:{port}/a.png",
        "gopher://localhost",
    ]
    urls += [
        str(file),
        f"file://{file}",
        f"file:{file}",
        f"FILE://localhost{file}",
        f"../{file.name}",
        f" {file}",
        f"~{file}",
    ]
    urls += [
        f"data:image/png;base64,{file}",
        f"data:text/plain,{file}",
        f"data:image/png,{file}",
        f"data:{file}",
        "data:",
        "",
    ]
    urls += [
        f"data:image/png;base64,\n{file}",
        f"s3://bucket{file}",
        f"memory:/{file}",
        f"pipe:cat {file}",
        "\0",
        f"\0{file}",
    ]
    return urls


def test_no_address_is_ever_fetched(server, trap, tmp_path, make_picture, image_part):
    file = tmp_path / "picture.png"
    make_picture(0).save(file)
    urls = addresses(trap.getsockname()[1], file)
    CONNECTIONS.clear()
    WATCHING.set()
    try:
        for url in urls:
            answer = server.chat([image_part(url)])
            assert answer.status == 400 and answer.error["code"] == "invalid_image", url
            assert answer.error["param"] == "messages.0.content.0.image_url.url"
            embedded = server.post("/v1/embeddings", {"input": [image_part(url)]})
            assert embedded.status == 400 and embedded.error["param"] == "input.0.image_url.url", url
    finally:
        WATCHING.clear()
    own = threading.current_thread().name
    assert any(event == "socket.connect" and thread == own for event, thread, _ in CONNECTIONS)  # the hook sees them
    assert not [
        found for found in CONNECTIONS if found[1] != own and (found[0] != "open" or file.name in str(found[2]))
    ]
    with pytest.raises(BlockingIOError):
        trap.accept()


def test_pictures_in_other_forms_are_refused(server, tmp_path, make_picture):
    file = tmp_path / "picture.png"
    make_picture(0).save(file)
    for part in (
        {"type": "image", "image": str(file)},
        {"type": "image", "path": str(file)},
        {"type": "image_url", "image_url": str(file)},
        {"type": "image_url", "image_url": {"url": "data:,", "path": str(file)}},
        {"type": "image_url", "url": str(file)},
        {"type": "input_image", "image_url": str(file)},
        {"type": "video_url", "video_url": {"url": f"file://{file}"}},
        {"type": "text", "text": "Hi", "image": str(file)},
    ):
        assert server.chat([part]).status == 400 and server.chat([part]).error
    assert server.chat([{"type": "text", "text": f"<img src='{file}'>"}]).status == 200


# Bombs


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = zlib.compress(b"\0" * 60_000_000, 1) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def vp8x(width: int, height: int, flags: int = 0) -> bytes:
    """A small picture that says of itself that it is large."""
    inner = saved(Image.new("RGB", (8, 8)), "WEBP")[12:]
    head = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(head)) + head + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def resized_jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG"))
    place = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, place + 5, height, width)
    return bytes(data)


def resized_webp(width: int, height: int, lossless: bool) -> bytes:
    data = bytearray(saved(Image.new("RGB", (64, 64)), "WEBP", lossless=lossless))
    if lossless:
        struct.pack_into("<I", data, 21, width - 1 | height - 1 << 14)
    else:
        struct.pack_into("<HH", data, 26, width, height)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    frames = [Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(200)]
    text = zlib.compress(b"a" * 1_000_000, 9)
    texts = [chunk(b"zTXt", b"k%d\0\0" % n + text) for n in range(63)]
    small = zlib.compress(b"\0" * 65 * 8)
    return {
        "a PNG of 40000 × 40000 black pixels": png(40_000, 40_000, depth=1),
        "a PNG of the largest size": png(2**31 - 1, 2**31 - 1),
        "a PNG without pixels": png(0, 0),
        "a PNG of 400 million pixels": png(20_000, 20_000),
        "an animated PNG": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "a PNG that says it is animated": png(64, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), data=small),
        "a PNG that is cut": png(64, 64)[:60],
        "a PNG with a wrong checksum": png(64, 8, data=small).replace(b"IDAT", b"IDAU", 1),
        "a PNG whose chunk is longer than the file": png(64, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT",
        "a PNG with texts and no pixels": png(64, 8, *texts, data=b""),
        "a JPEG of 65500 × 65500": resized_jpeg(65_500, 65_500),
        "a JPEG of a thousand scans": saved(frames[0], "JPEG")[:-2]
        + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 1000,
        "a JPEG of nothing": b"\xff\xd8\xff",
        "a WebP of 16 million × 16 million": vp8x(2**24, 2**24),
        "an animated WebP": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "a WebP that says it is animated": vp8x(8, 8, flags=2),
        "a WebP of 16383 × 16383": resized_webp(16_383, 16_383, lossless=False),
        "a lossless WebP of 16384 × 16384": resized_webp(16_384, 16_384, lossless=True),
        "a WebP of nothing": b"RIFF\0\0\0\0WEBP",
        "a WebP cut in its header": b"RIFF\x10\0\0\0WEBPVP8X\x0a\0\0\0\0",
        "a GIF": saved(frames[0], "GIF"),
        "a TIFF": saved(frames[0], "TIFF"),
        "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "a PDF": b"%PDF-1.4",
        "nothing": b"",
        "noise": random.Random(0).randbytes(1000),
    }


@pytest.fixture(scope="module")
def made_bombs(tmp_path_factory) -> dict[str, bytes]:
    """Made once, and before memory is measured."""
    return bombs()


def peak_above_now() -> Iterator[float]:
    """First next(): begin. Second: megabytes that were held since, beyond those at the beginning."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from now
    now = _status("VmRSS")
    yield 0.0
    yield (_status("VmHWM") - now) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def test_image_bombs_are_refused_before_they_go_off(server, made_bombs, image_part, make_picture):
    server.chat([image_part(make_picture(0)), {"type": "text", "text": "Hi"}])
    for name, data in made_bombs.items():
        encoded = image_part(data)
        memory = peak_above_now()
        next(memory)
        answer = server.chat([encoded, {"type": "text", "text": "Hi"}])
        assert next(memory) < MEGABYTES, name
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error", name
        assert server.post("/v1/embeddings", {"input": [encoded]}).status == 400, name


def test_what_a_picture_carries_beside_its_pixels_is_left_out(server, image_part, make_picture):
    """Texts and profiles may be compressed as much as pixels."""
    info = PngImagePlugin.PngInfo()
    for number in range(60):
        info.add_itxt(f"key{number}", "a" * 1_000_000, zip=True)
    heavy, light = saved(make_picture(3), "PNG", pnginfo=info), saved(make_picture(3), "PNG")
    assert len(heavy) > len(light) + 50_000
    memory = peak_above_now()
    next(memory)
    answer = server.chat([image_part(heavy), {"type": "text", "text": "Hi"}])
    assert next(memory) < MEGABYTES
    expected = server.chat([image_part(light), {"type": "text", "text": "Hi"}]).json["choices"]
    assert answer.json["choices"] == expected
    webp = saved(make_picture(3), "WEBP", lossless=True, xmp=b"a" * 100_000, icc_profile=b"b" * 999)
    assert server.chat([image_part(webp), {"type": "text", "text": "Hi"}]).json["choices"] == expected


def test_damaged_base64_is_refused(server, make_picture):
    good = base64.b64encode(saved(make_picture(0), "PNG")).decode()
    for bad in (
        good[:-1],
        good + "=",
        good + "====",
        "=" + good,
        good[:99] + "\n" + good[99:],
        good + "é",
        good[:40] + "-_",
    ):
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{bad}"}}
        assert server.chat([part]).status == 400, bad[-10:]


# Sizes


def raw(server, head: str, pieces: Iterator[bytes]) -> tuple[bytes, int]:
    """Send pieces until the server answers; the answer, and how many bytes were sent."""
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        connection.setblocking(False)
        answer = b""
        for piece in pieces:
            try:
                answer += connection.recv(65536)
            except BlockingIOError:
                pass
            if answer:
                break
            connection.setblocking(True)
            connection.sendall(piece)
            sent += len(piece)
            connection.setblocking(False)
            time.sleep(0.001)
        connection.settimeout(30)
        while b"}}" not in answer and (more := connection.recv(65536)):
            answer += more
    return answer, sent


def test_a_body_over_the_limit_is_refused_before_it_comes(server):
    """2 000 000 bytes are allowed; 100 000 000 are announced, and none of them is needed for an answer."""
    head = f"POST {CHAT} HTTP/1.1\nHost: a\nContent-Type: application/json\nContent-Length: 100000000"
    answer, sent = raw(server, head, iter([b" " * 1000] * 1000))
    assert answer.startswith(b"HTTP/1.1 413") and b'"code": "body_too_large"' in answer
    assert sent < 1_000_000


def test_a_chunked_body_over_the_limit_is_refused_while_it_comes(server):
    head = f"POST {CHAT} HTTP/1.1\nHost: a\nContent-Type: application/json\nTransfer-Encoding: chunked"
    piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
    memory = peak_above_now()
    next(memory)
    answer, sent = raw(server, head, itertools.repeat(piece, 1000))
    assert answer.startswith(b"HTTP/1.1 413") and b'"code": "body_too_large"' in answer
    assert 2_000_000 - 65536 < sent < 20_000_000
    assert next(memory) < 20


def test_a_body_of_the_limit_is_read_and_one_byte_more_is_not(server):
    told = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).encode()
    assert server.send(CHAT, told + b" " * (2_000_000 - len(told))).status == 200
    over = server.send(CHAT, told + b" " * (2_000_001 - len(told)))
    assert over.status == 413 and over.error["code"] == "body_too_large"


def test_bodies_together_are_bounded(serving):
    """Nine clients that send one large body each, and never its last byte."""
    with serving(body_bytes=1_000_000) as running:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        slow = [socket.create_connection(("127.0.0.1", running.port), timeout=30) for _ in range(9)]
        for connection in slow:
            connection.sendall(head.encode() + b" " * 999_000)
        slow[0].settimeout(0.05)
        answers = []
        end = time.monotonic() + 20
        while not answers and time.monotonic() < end:
            for connection in slow:
                connection.settimeout(0.05)
                try:
                    answers.append(connection.recv(4096))
                except TimeoutError:
                    pass
        assert answers[0].startswith(b"HTTP/1.1 503") and b"overloaded" in answers[0]
        for connection in slow:
            connection.close()
        running.healthy()


def test_a_body_that_does_not_come_is_not_waited_for(serving, monkeypatch):
    monkeypatch.setattr("vlm.serve.gate.SLOWEST", 0.2)
    with serving() as running:
        head = f"POST {CHAT} HTTP/1.1\nHost: a\nContent-Type: application/json\nContent-Length: 100"
        answer, _ = raw(running, head, iter([b"{"]))
        assert answer.startswith(b"HTTP/1.1 408")
        running.healthy()


def test_what_one_request_may_ask_for_is_bounded(server, make_picture, image_part):
    part, text = image_part(make_picture(0)), {"type": "text", "text": "Hi"}
    large, exact = Image.new("RGB", (400, 251)), Image.new("RGB", (400, 250))
    cases = [
        (server.chat([part] * 4 + [text]), "too_many_images", "3"),
        (server.post("/v1/embeddings", {"input": [part] * 4}), "too_many_images", "3"),
        (server.chat([image_part(large), text]), "invalid_image", "400×251"),
        (server.chat("Hi", max_tokens=100_000), "context_length_exceeded", "100000"),
        (server.chat("Hi", max_tokens=None, max_completion_tokens=10**18), "context_length_exceeded", "256"),
        (server.chat("word " * 100), "context_length_exceeded", "256"),
        (server.chat("a" * 1_000_000), "context_length_exceeded", "1000000 characters"),
        (server.post("/v1/completions", {"prompt": "a" * 1_000_000}), "context_length_exceeded", "1000000 characters"),
        (server.post("/v1/completions", {"prompt": "a" * 300}), "context_length_exceeded", "300"),
        (server.post("/v1/embeddings", {"input": "a" * 1_000_000}), "context_length_exceeded", "1000000 characters"),
        (server.post("/v1/embeddings", {"input": "a" * 300}), "context_length_exceeded", "301"),
        (server.post("/v1/embeddings", {"input": ["a"] * 21}), "invalid_value", "21"),
        (server.post("/v1/embeddings", {"input": "a", "dimensions": 3}), "invalid_value", "16"),
        (server.chat("Hi", n=4), "invalid_value", "3"),
        (server.post("/v1/completions", {"prompt": ["a"] * 21}), "invalid_value", "20"),
    ]
    for number, (answer, code, told) in enumerate(cases):
        assert answer.status == 400 and answer.error["code"] == code, (number, answer.body)
        assert told in answer.error["message"], answer.error
    assert server.chat([part] * 3 + [text]).status == 200
    assert server.chat([image_part(exact), text]).status == 200


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
