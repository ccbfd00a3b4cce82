"""A thousand requests that a fuzzer draws from the server's own schema, valid and invalid: each is answered, none does harm."""

from __future__ import annotations

import json
import time
from collections import Counter

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis import GenerationMode

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@pytest.mark.parametrize("requests", [100, pytest.param(1000, marks=pytest.mark.heavy)])
def test_requests_from_a_fuzzer_leave_the_server_healthy(server, requests):
    schema = schemathesis.openapi.from_dict(server.send("/openapi.json").json)
    drawn = strategies.one_of(
        schema[route]["POST"].as_strategy(generation_mode=mode) for route in ROUTES for mode in GenerationMode
    )
    statuses: Counter[int] = Counter()

    @hypothesis.given(drawn)
    @hypothesis.settings(
        max_examples=requests,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        try:
            body = json.dumps(case.body).encode()
        except TypeError:  # a body that is left out, or of another media type
            body = b""
        begun = time.monotonic()
        answer = server.send(case.path, body)
        statuses[answer.status] += 1
        assert answer.status in (200, 400, 404), answer.body
        if answer.status != 200:
            assert answer.error["type"] == "invalid_request_error"
        assert time.monotonic() - begun < 60
        assert server.send("/health").status == 200

    send()
    print(statuses)
    assert statuses.total() >= requests * 0.9 and len(statuses) > 1, statuses
    server.healthy()
