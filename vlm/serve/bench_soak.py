"""The long part of `vlm bench serve`: thousands of requests of every kind, while the server's memory is watched.

Knows what clients may ask and how they behave. Knows a server only by its port; of what it answers the status alone is judged.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm.errors import RunError

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MOST_WORDS, MOST_PICTURES, MOST_TURNS, MOST_TOKENS = 30, 3, 3, 16
LEAST_PIXELS, MOST_PIXELS = 16, 160  # a side of a picture
KEPT = 1.0  # seconds without a request after which a client connects anew, before the server hangs up
# As few as a language has in use: a tokenizer keeps ten thousand words that it has met, whatever they are.
WORDS = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("n", "r", "st", "ing")]
TOPICS = 40  # requests in a row that begin as one conversation did


@dataclass(frozen=True)
class Request:
    """What a client sends, and whether it waits for the end. status: what it is to be answered."""

    path: str
    told: dict[str, Any]
    status: int = 200
    stays: bool = True


def request(number: int) -> Request:
    """The request of a number: its kind, its pictures, all lengths and settings follow from it."""
    chance = random.Random(number)
    (kind,) = chance.choices(list(KINDS), list(KINDS.values()))
    return kind(number, chance)


def send(port: int, numbers: Iterable[int], clients: int) -> None:
    """Send the requests of these numbers, by so many clients at once, each with a connection that it keeps.

    Raises RunError for an answer of another status than the request asks for.
    """
    numbers = list(numbers)
    with ThreadPoolExecutor(clients) as pool:
        for _ in pool.map(lambda first: _client(port, numbers[first::clients]), range(clients)):
            pass


def _client(port: int, numbers: Iterable[int]) -> None:
    connection, used = http.client.HTTPConnection("127.0.0.1", port, timeout=600), time.monotonic()
    for number in numbers:
        asked = request(number)
        body = json.dumps(asked.told).encode()
        if time.monotonic() - used > KEPT:
            connection.close()  # `request` opens it again
        connection.request("POST", asked.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != asked.status:
            raise RunError(
                f"request {number} of the soak is answered {response.status} where {asked.status} is due: "
                f"{response.read().decode()[:200]}"
            )
        if asked.stays:
            response.read()
        else:
            response.readline()
            connection.close()
        used = time.monotonic()
    connection.close()


def _question(number: int, chance: random.Random) -> Request:
    pictures = [_picture(chance) for _ in range(chance.randint(1, MOST_PICTURES))]
    content = [*pictures, {"type": "text", "text": f"{number}: {_text(chance)}?"}]
    return Request(CHAT, {"messages": [{"role": "user", "content": content}], **_settings(chance)})


def _conversation(number: int, chance: random.Random) -> Request:
    """Its first turns are those of others, so that what was read of them is taken over."""
    topic = random.Random(-1 - number // TOPICS)
    turns = [{"role": role, "content": _text(topic)} for _ in range(MOST_TURNS) for role in ("user", "assistant")]
    messages = turns[: 2 * chance.randrange(MOST_TURNS)] + [{"role": "user", "content": f"{number} {_text(chance)}"}]
    return Request(CHAT, {"messages": messages, **_settings(chance)})


def _completion(number: int, chance: random.Random) -> Request:
    prompts = [f"{number} {_text(chance)}" for _ in range(chance.randint(1, 2))]
    return Request(COMPLETIONS, {"prompt": prompts, "n": chance.randint(1, 2), **_settings(chance)})


def _embedding(number: int, chance: random.Random) -> Request:
    return Request(EMBEDDINGS, {"input": [f"{number} {_text(chance)}", _picture(chance)]})


def _hang_up(number: int, chance: random.Random) -> Request:
    told = _question(number, chance).told
    return Request(CHAT, {**told, "stream": True}, stays=False)


def _broken(number: int, chance: random.Random) -> Request:
    broken = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_text(chance)}"}}
    return Request(CHAT, {"messages": [{"role": "user", "content": [broken]}]}, status=400)


KINDS: dict[Callable[[int, random.Random], Request], float] = {  # -> the share of each
    _question: 0.50,
    _conversation: 0.20,
    _completion: 0.10,
    _embedding: 0.10,
    _hang_up: 0.05,
    _broken: 0.05,
}


def _settings(chance: random.Random) -> dict[str, Any]:
    told: dict[str, Any] = {"max_tokens": chance.randint(1, MOST_TOKENS), "stream": chance.random() < 0.3}
    if chance.random() < 0.5:
        return {**told, "temperature": 0}
    return {**told, "temperature": chance.uniform(0.2, 1.5), "top_p": 0.9, "seed": chance.getrandbits(31), "stop": "e"}


def _text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, MOST_WORDS)))


def _picture(chance: random.Random) -> dict[str, Any]:
    """One that nobody has sent."""
    height, width = chance.randint(LEAST_PIXELS, MOST_PIXELS), chance.randint(LEAST_PIXELS, MOST_PIXELS)
    pixels = np.frombuffer(chance.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    kind, file = chance.choice(("JPEG", "PNG", "WEBP")), io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind.lower()};base64,{data}"}}
