"""The requests of the long part of `vlm bench serve`: of every kind, answered as is due, and nothing is left of them."""

from __future__ import annotations

import json

import pytest

from vlm.errors import RunError
from vlm.serve import bench_soak
from vlm.serve.requests import CompletionRequest, read_request

CLIENTS = 4


def test_a_request_follows_from_its_number_alone():
    told = [json.dumps(bench_soak.request(number).told) for number in range(60)]
    assert told == [json.dumps(bench_soak.request(number).told) for number in range(60)]
    assert len(set(told)) == 60


def test_every_kind_is_sent_and_nothing_is_left(serving):
    first = {}
    for number in range(200):
        asked = bench_soak.request(number)
        first.setdefault((asked.path, asked.status, asked.stays, bool(asked.told.get("stream"))), number)
    # Chat whole, streamed, hung up on and refused; completions whole and streamed; embeddings.
    assert len(first) == 4 + 2 + 1
    with serving(rows=3) as running:
        bench_soak.send(running.port, first.values(), CLIENTS)
        running.healthy()
        counted = [
            running.metric("vlm_requests_total", route=bench_soak.CHAT, status=str(status)) for status in (200, 400)
        ]
        assert counted == [4, 1]


def test_an_answer_that_is_not_due_ends_it(serving):
    with serving(images=1) as running:
        numbers = [n for n in range(100) if len(json.dumps(bench_soak.request(n).told).split("image_url")) > 5]
        with pytest.raises(RunError, match=rf"request {numbers[0]} of the soak is answered 400 where 200 is due"):
            bench_soak.send(running.port, numbers[:1], CLIENTS)


def test_no_text_outlives_its_request():
    """A parser that keeps short texts for the next request would hold what clients wrote, and grow with it."""
    body = json.dumps({"prompt": "what a client wrote"}).encode()
    once, again = (read_request(body, CompletionRequest, 100).prompt for _ in range(2))
    assert once == again and once is not again
