"""What a client gets that asks properly, with OpenAI's own library, held against the model asked directly."""

from __future__ import annotations

import base64
import json
import threading

import numpy as np
import openai
import pytest

from vlm.api import user_turn

MODEL = "tiny"


def asked(text: str, *parts: dict) -> list[dict]:
    """One turn of a user: pictures, then text."""
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture
def ask(server):
    """chat.completions.create, greedy unless told otherwise."""

    def create(messages, **options):
        options = {"temperature": 0, "max_completion_tokens": 12, **options}
        return server.client.chat.completions.create(model=MODEL, messages=messages, **options)

    return create


def test_a_greedy_reply_is_that_of_the_model(ask, model, make_picture, image_part):
    pictures = [make_picture(seed) for seed in range(2)]
    parts = [image_part(picture) for picture in pictures]
    for shown in ([], pictures[:1], pictures):
        reply = ask(asked("What is it?", *parts[: len(shown)]))
        assert reply.choices[0].message.content == model.generate(user_turn(shown, "What is it?"), max_new_tokens=12)
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 12
        assert reply.usage.prompt_tokens == len(model.prompt(user_turn(shown, "What is it?")).ids)


def test_jpeg_and_webp_are_pictures_too(ask, model, make_picture, image_part):
    for kind in ("JPEG", "WEBP"):
        part = image_part(make_picture(1), kind)
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        expected = model.generate(user_turn([data], "Hm?"), max_new_tokens=12)
        assert ask(asked("Hm?", part)).choices[0].message.content == expected


def test_a_conversation_keeps_its_turns_and_is_not_read_again(ask, model, make_picture, image_part):
    picture = make_picture(7)
    first = asked("Tell me of this picture, all of it.", image_part(picture))
    said = ask(first).choices[0].message.content
    turns = [{"role": "developer", "content": "Be brief."}, *first, {"role": "assistant", "content": said}]
    more = [*turns, {"role": "user", "content": "And?"}]
    own = [
        {"role": "system", "content": "Be brief."},
        *user_turn([picture], "Tell me of this picture, all of it."),
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And?"},
    ]
    reply = ask(more)
    assert reply.choices[0].message.content == model.generate(own, max_new_tokens=12)
    again = ask(more)
    assert again.choices[0].message.content == reply.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.usage.prompt_tokens == reply.usage.prompt_tokens


def test_a_reply_is_taken_back_as_the_client_has_it(ask):
    first = asked("Tell me.")
    told = ask(first).choices[0].message
    asks_on = {"role": "user", "content": "And?"}
    plain = ask([*first, {"role": "assistant", "content": told.content}, asks_on]).choices[0].message
    for message in (told, told.model_dump(), told.to_dict(), json.loads(told.model_dump_json())):
        assert ask([*first, message, asks_on]).choices[0].message == plain
    for name in ("refusal", "tool_calls"):
        with pytest.raises(openai.BadRequestError) as raised:
            ask([*first, {**told.model_dump(), name: "said"}, asks_on])
        assert raised.value.param == f"messages.1.{name}"


def test_a_stream_is_the_reply_in_pieces(ask, make_picture, image_part):
    messages = asked("Describe it.", image_part(make_picture(3)))
    whole = ask(messages, max_completion_tokens=40)
    chunks = list(ask(messages, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert sum(bool(piece) for piece in said) > 2
    assert "".join(said) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in ask(messages, stream=True))


def test_a_stream_ends_with_done(server):
    told = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    answer = server.post("/v1/chat/completions", told)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_stop_ends_a_reply(ask):
    whole = ask(asked("Go on")).choices[0].message.content
    at = next(place for place in range(2, len(whole)) if whole[place].isascii() and whole[place].strip())
    stop = whole[at]
    for given in (stop, ["never said", stop]):
        reply = ask(asked("Go on"), stop=given)
        assert reply.choices[0].message.content == whole.partition(stop)[0].strip()
        assert reply.choices[0].finish_reason == "stop"
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(asked("Go on"), stop=stop, stream=True)]
    assert "".join(streamed) == whole.partition(stop)[0].strip()


def test_n_replies_are_drawn_apart_and_a_seed_repeats_them(ask):
    def drawn(**options) -> list[str]:
        choices = ask(asked("Say"), n=3, temperature=1, max_tokens=12, **options).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        return [choice.message.content for choice in choices]

    first = drawn(seed=5)
    assert len(set(first)) == 3
    assert drawn(seed=5) == first
    assert drawn(seed=6) != first
    assert drawn(seed=-(2**63)) == drawn(seed=-(2**63))
    assert drawn() != drawn()
    streamed = ["", "", ""]
    for chunk in ask(asked("Say"), n=3, temperature=1, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_what_is_not_said_is_as_openai_has_it(server, ask):
    """Temperature 1, one reply, as long as there is room."""
    create = server.client.chat.completions.create
    replies = {create(model=MODEL, messages=asked("Say"), max_tokens=12).choices[0].message.content for _ in range(4)}
    assert len(replies) > 1
    long = create(model=MODEL, messages=asked("Say"), temperature=0)
    room = server.service._prompts._length - long.usage.prompt_tokens
    assert long.choices[0].finish_reason == "stop" or long.usage.completion_tokens == room
    nothing = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "user": "me", "stop": None}
    assert ask(asked("Say"), **nothing).choices[0].message.content == ask(asked("Say")).choices[0].message.content


def test_sampling_settings_reach_the_engine(ask):
    greedy = ask(asked("Say")).choices[0].message.content
    assert ask(asked("Say"), temperature=2, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert ask(asked("Say"), temperature=2, top_p=1e-30).choices[0].message.content == greedy
    assert ask(asked("Say"), temperature=2, extra_body={"min_p": 1}).choices[0].message.content == greedy
    assert ask(asked("Say"), temperature=1e-30).choices[0].message.content == greedy
    assert ask(asked("Say"), extra_body={"repetition_penalty": 50}).choices[0].message.content != greedy


def test_completions_go_on_from_plain_text(server, model):
    create = server.client.completions.create
    reply = create(model=MODEL, prompt="Once upon", temperature=0)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == model.complete("Once upon", max_new_tokens=16)
    assert reply.usage.completion_tokens == 16
    several = create(model=MODEL, prompt=["Once upon", "There was"], temperature=0, n=2, max_tokens=5)
    expected = [model.complete(text, max_new_tokens=5) for text in ("Once upon", "There was")]
    assert [choice.text for choice in several.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert several.usage.prompt_tokens == sum(len(model.text_prompt(text).ids) for text in ("Once upon", "There was"))
    chunks = list(create(model=MODEL, prompt="Once upon", temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_embeddings_are_the_models(server, model, make_picture, image_part):
    texts = ["a red circle", "two blue squares", "nothing"]
    made = server.client.embeddings.create(model=MODEL, input=texts)  # the library asks for base64
    assert np.array_equal(np.array([one.embedding for one in made.data], np.float32), model.embed_text(texts).numpy())
    assert [one.index for one in made.data] == [0, 1, 2]
    assert made.usage.prompt_tokens == sum(len(text) + 1 for text in texts)
    plain = server.client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float", dimensions=16)
    assert np.allclose(plain.data[0].embedding, model.embed_text(texts[0]).numpy()[0], atol=1e-6)
    pictures = [make_picture(seed) for seed in range(2)]
    mixed = server.post("/v1/embeddings", {"input": [texts[0], *map(image_part, pictures)]}).json
    expected = np.concatenate([model.embed_text(texts[0]).numpy(), model.embed_image(pictures).numpy()])
    assert np.allclose([one["embedding"] for one in mixed["data"]], expected, atol=1e-6)


def test_models_are_listed(server):
    assert [card.id for card in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("another")


def test_errors_are_the_librarys_own(server, serving, ask):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(asked("Hi"), temperature=3)
    assert raised.value.param == "temperature" and "2" in raised.value.message
    with pytest.raises(openai.NotFoundError) as raised:
        server.client.chat.completions.create(model="gpt-4o", messages=asked("Hi"))
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as raised:
        ask(asked("Hi"), tools=[])
    assert raised.value.code == "unknown_parameter" and raised.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as raised:
        ask(asked("Hi"), max_completion_tokens=10_000)
    assert raised.value.code == "context_length_exceeded"


def test_a_key_is_asked_for(serving):
    with serving(api_key="secret") as closed:
        with pytest.raises(openai.AuthenticationError):
            closed.client.models.list()
        assert closed.send("/v1/chat/completions", b"{}", authorization="Bearer secre").status == 401
        assert closed.send("/health").status == closed.send("/metrics").status == 200
        assert closed.client.with_options(api_key="secret").models.list().data[0].id == MODEL


def test_many_at_once_get_what_each_gets_alone(ask, make_picture, image_part):
    questions = [asked(f"Question {n}, {'long ' * n}", *[image_part(make_picture(n))] * (n % 3)) for n in range(12)]
    alone = [ask(question).choices[0].message.content for question in questions]
    together: dict[int, str] = {}

    def one(place: int) -> None:
        together[place] = ask(questions[place], stream=False).choices[0].message.content

    threads = [threading.Thread(target=one, args=(place,)) for place in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[place] for place in range(12)] == alone


def test_metrics_count(server, ask):
    names = ("vlm_requests_total", "vlm_tokens_total", "vlm_first_token_seconds_count", "vlm_token_seconds_count")
    labels = [{"route": "/v1/chat/completions", "status": "200"}, {"kind": "new"}, {}, {}]
    before = [server.metric(name, **label) for name, label in zip(names, labels, strict=True)]
    ask(asked("Count"), n=2)
    after = [server.metric(name, **label) for name, label in zip(names, labels, strict=True)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 24, 2, 2]
    assert server.metric("vlm_cache_bytes") > 0
