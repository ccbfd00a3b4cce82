"""Clients that mean harm by size: bodies too large, too slow, too many; each is refused and costs little."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Iterator

import pytest
from peak import peak_above_now
from PIL import Image

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.usefixtures("unharmed")


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
