"""What a person calls, on tiny models: shapes of results, agreement with the slow path, repeatable sampling, streaming."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

import vlm
from vlm.api import user_turn
from vlm.errors import UsageError


def reply(talker: vlm.VLM, messages: list[dict], new_tokens: int) -> str:
    """The same question through Hugging Face's own surface, alone and without a cache."""
    inputs = talker.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = talker.model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=False, eos_token_id=1, pad_token_id=0
    )
    return talker.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_captions_are_the_answer_to_the_caption_prompt(talker, pictures):
    alone = [talker.caption(picture, max_new_tokens=6) for picture in pictures]
    assert talker.caption(pictures, max_new_tokens=6) == alone
    assert alone == [reply(talker, user_turn([p], talker.processor.caption_prompt), 6) for p in pictures]
    assert talker.caption(pictures[0], prompt="Hm?", max_new_tokens=6) == talker.answer(
        pictures[0], "Hm?", max_new_tokens=6
    )
    assert talker.caption([]) == []


def test_answers_are_greedy_and_may_look_at_several_pictures(talker, pictures):
    assert talker.answer(pictures[0], "What?", max_new_tokens=6) == reply(talker, user_turn(pictures[:1], "What?"), 6)
    several = talker.answer(pictures, "Which?", max_new_tokens=6)
    assert several == reply(talker, user_turn(pictures, "Which?"), 6)
    assert several != talker.answer(pictures[::-1], "Which?", max_new_tokens=6)


def test_a_picture_may_be_a_path_bytes_or_an_array(talker, pictures, tmp_path):
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    expected = talker.embed_image(pictures[0])
    for given in (path, str(path), path.read_bytes(), np.asarray(pictures[0])):
        assert torch.equal(talker.embed_image(given), expected)
        assert talker.answer(given, "What?", max_new_tokens=4) == talker.answer(pictures[0], "What?", max_new_tokens=4)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_batch_of_conversations_equals_each_alone(talker, pictures, batch_size):
    conversations = [
        user_turn([pictures[0]], "What is it?"),
        user_turn([], "No picture here, just a longer question."),
        user_turn(pictures[1:], "And these?"),
        [
            *user_turn([pictures[0]], "Again?"),
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "So?"},
        ],
    ]
    together = talker.generate(conversations, batch_size=batch_size, max_new_tokens=6)
    assert together == [talker.generate(conversation, max_new_tokens=6) for conversation in conversations]
    assert together == [reply(talker, conversation, 6) for conversation in conversations]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}, {"num_beams": 2}])
def test_replies_that_come_one_by_one_are_those_that_come_together(talker, pictures, options):
    conversations = [user_turn([pictures[n % 3]] if n % 2 else [], f"Question {n}?" * (n + 1)) for n in range(11)]
    together = talker.generate(conversations, batch_size=3, max_new_tokens=6, **options)
    taken: list[int] = []

    def late():
        for number, conversation in enumerate(conversations):
            taken.append(number)
            yield conversation

    replies = {}
    for place, text in talker.generate_each(late(), batch_size=3, max_new_tokens=6, **options):
        assert len(taken) <= len(replies) + 3 * 3, "two batches ahead of those that are being answered"
        replies[place] = text
    assert [replies[place] for place in range(11)] == together
    share = talker.generate_each(conversations[1::2], numbers=range(1, 11, 2), max_new_tokens=6, **options)
    assert dict(share) == {place: together[place] for place in range(1, 11, 2)}
    with pytest.raises(UsageError, match="batch_size is 0"):
        next(talker.generate_each(conversations, batch_size=0))


@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_best_replies_of_a_search_are_those_of_generate(talker, pictures, batch_size):
    conversations = [user_turn(pictures[:number], f"Question {number}?") for number in range(3)]
    options = {"max_new_tokens": 5, "num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"}
    expected = []
    for messages in conversations:
        inputs = talker.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        told = options | {"do_sample": False, "eos_token_id": 1, "pad_token_id": 0, "num_return_sequences": 3}
        new = talker.model.generate(**inputs, **told)[:, inputs["input_ids"].shape[1] :]
        expected.append([text.strip() for text in talker.processor.batch_decode(new, skip_special_tokens=True)])
    assert talker.generate(conversations, n=3, batch_size=batch_size, **options) == expected
    assert talker.generate(conversations[0], n=2, **options) == expected[0][:2]
    assert talker.generate(conversations, batch_size=batch_size, **options) == [texts[0] for texts in expected]
    with pytest.raises(UsageError, match="n is 5, temperature is 0 and num_beams is 4"):
        talker.generate(conversations[0], n=5, **options)


def test_questions_on_one_picture_prepare_it_once(talker, pictures):
    seen: list[int] = []
    hook = talker.model.vision.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    conversations = [user_turn([pictures[number % 2]], f"Question {number}?") for number in range(6)]
    talker.generate(conversations, max_new_tokens=2)
    hook.remove()
    assert seen == [2]


def test_a_seed_repeats_a_sample_and_leaves_the_global_state(talker, pictures):
    messages = user_turn(pictures[:1], "What?")
    options = {"max_new_tokens": 12, "temperature": 1.0}
    state = torch.get_rng_state()
    first = talker.generate(messages, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == talker.generate(messages, seed=1, **options)
    assert first != talker.generate(messages, seed=2, **options)
    assert talker.generate(messages, seed=-1, **options) == talker.generate(messages, seed=-1, **options)
    greedy = talker.generate(messages, max_new_tokens=12)
    assert talker.generate(messages, seed=3, max_new_tokens=12, temperature=1.0, top_k=1) == greedy
    assert talker.generate(messages, seed=3, max_new_tokens=12, temperature=1.0, top_p=1e-6) == greedy


def test_sampling_follows_the_models_probabilities(talker):
    """2000 samples of one token against softmax(logits / temperature), nothing cut off."""
    prompts = [user_turn([], "Say it.")] * 2000
    inputs = talker.processor.apply_chat_template(
        prompts[0], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    with torch.no_grad():
        probabilities = (talker.model(**inputs).logits[0, -1] / 0.25).softmax(-1)
    top = probabilities.topk(5).indices
    said = talker.generate(prompts, batch_size=250, max_new_tokens=1, temperature=0.25, seed=0)
    for index in top.tolist():
        word = talker.processor.tokenizer.decode([index]).strip()
        share = said.count(word) / len(said)
        same = sum(
            probabilities[i].item() for i in range(288) if talker.processor.tokenizer.decode([i]).strip() == word
        )
        assert share == pytest.approx(same, abs=4 * (same * (1 - same) / 2000) ** 0.5 + 1e-3)


def test_streamed_pieces_join_to_the_reply(talker, pictures):
    messages = user_turn(pictures[:1], "What?")
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        pieces = list(talker.stream(messages, max_new_tokens=12, **options))
        assert "".join(pieces).strip() == talker.generate(messages, max_new_tokens=12, **options)
        assert all(pieces)


def test_a_reader_that_stops_stops_the_work(talker, pictures):
    before = threading.active_count()
    steps: list[int] = []

    def slowly(*args):
        steps.append(1)
        time.sleep(0.002)

    hook = talker.model.language_model.register_forward_hook(slowly)
    stream = talker.stream(user_turn(pictures[:1], "What?"), max_new_tokens=200, temperature=1.0, top_k=60)
    next(stream)
    stream.close()
    hook.remove()
    assert threading.active_count() == before
    assert len(steps) < 200


def test_what_goes_wrong_in_a_stream_reaches_its_reader(talker, pictures):
    def fail(*args):
        raise ValueError("the layer is broken")

    hook = talker.model.language_model.register_forward_pre_hook(fail)
    before = threading.active_count()
    with pytest.raises(ValueError, match="the layer is broken"):
        list(talker.stream(user_turn(pictures[:1], "What?")))
    hook.remove()
    assert threading.active_count() == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, torch.cuda.OutOfMemoryError, UsageError])
def test_what_went_wrong_leaves_the_next_call_right(talker, pictures, fault, monkeypatch):
    """The picture before must not be answered about."""

    def answer(asker: vlm.VLM, picture) -> str:
        return asker.answer(picture, "What is it?", max_new_tokens=8)

    def fail(*args):
        raise fault("now")

    first, second = (answer(vlm.VLM(talker.model, talker.processor), picture) for picture in pictures[:2])
    assert first != second
    asker = vlm.VLM(talker.model, talker.processor)
    assert answer(asker, pictures[0]) == first
    with monkeypatch.context() as broken:
        broken.setattr(talker.model, "image_states", fail)
        with pytest.raises(fault):
            answer(asker, pictures[1])
    assert [answer(asker, picture) for picture in pictures[1::-1]] == [second, first]


def test_what_was_read_is_kept_by_a_reader_that_stops(talker, pictures):
    asker = vlm.VLM(talker.model, talker.processor)
    asker.answer(pictures[0], "What?", max_new_tokens=2)
    kept = asker._own_engine
    stream = asker.stream(user_turn(pictures[:1], "What?"), max_new_tokens=8)
    next(stream)
    stream.close()
    assert asker._own_engine is kept is not None and not kept.busy


def test_a_model_may_change_its_type_between_calls(make_model, make_processor, pictures):
    asker = vlm.VLM(make_model(gate_init=1.0), make_processor())
    asker.answer(pictures[0], "What?", max_new_tokens=4)
    asker.model.to(torch.bfloat16)
    changed = asker.answer(pictures[0], "What?", max_new_tokens=4)
    assert changed == vlm.VLM(asker.model, asker.processor).answer(pictures[0], "What?", max_new_tokens=4)


def test_completion_returns_what_is_new(talker):
    tokenizer = talker.processor.tokenizer
    for prompt in ("Once upon", "a"):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
        out = talker.model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=0)
        assert talker.complete(prompt, max_new_tokens=6) == tokenizer.decode(
            out[0, ids.shape[1] :], skip_special_tokens=True
        )
    assert talker.complete(["Once upon", "a"], max_new_tokens=6) == [
        talker.complete(prompt, max_new_tokens=6) for prompt in ("Once upon", "a")
    ]


def test_loglikelihood_is_the_sum_over_what_the_assistant_says(talker, pictures):
    conversations = [
        [*user_turn(pictures[:1], "What?"), {"role": "assistant", "content": "A cat"}],
        [*user_turn([], "A longer question without a picture?"), {"role": "assistant", "content": "No"}],
        [*user_turn(pictures[:2], "Two?"), {"role": "assistant", "content": "Yes"}, *user_turn([], "Sure?"),
         {"role": "assistant", "content": "Quite sure."}],
    ]  # fmt: skip
    results = talker.loglikelihood(conversations)
    for conversation, (total, count) in zip(conversations, results, strict=True):
        ids, targets = talker.processor.encode_dialogue(conversation)
        inputs = talker.processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
        with torch.no_grad():
            told = talker.model(**inputs).logits[0].log_softmax(-1)
        expected = sum(told[place - 1, ids[place]].item() for place in range(len(ids)) if targets[place])
        assert total == pytest.approx(expected, rel=1e-5) and count == sum(targets)
    alone = [talker.loglikelihood([conversation])[0] for conversation in conversations]
    assert [total for total, _ in results] == pytest.approx([total for total, _ in alone], rel=1e-6)
    assert [count for _, count in talker.loglikelihood(conversations, batch_size=2)] == [count for _, count in results]


@pytest.mark.parametrize("mask", ["<mask>", "[MASK]"])
def test_masks_are_ranked_in_place_by_encoders_and_from_before_by_decoders(
    talker, filler, mask, make_model, make_processor, make_tokenizer
):
    for judge, shift in ((filler, 0), (talker, 1)):
        if mask != "<mask>":
            tokenizer = make_tokenizer()
            tokenizer.add_special_tokens({"mask_token": mask})
            model = make_model("bert" if shift == 0 else "qwen3")
            model.resize_token_embeddings(len(tokenizer) + 25)
            judge = vlm.VLM(model, make_processor(tokenizer))
        processor = judge.processor
        ranked = judge.fill_mask("The <mask> is shining.", top_k=4)
        ids = processor.tokenizer(f"The {processor.mask_token} is shining.", return_tensors="pt")["input_ids"]
        place = ids[0].tolist().index(processor.mask_token_id)
        with torch.no_grad():
            logits = judge.model(input_ids=ids, bidirectional=True).logits[0, place - shift]
        top = logits.softmax(-1).topk(4)
        assert [probability for _, probability in ranked] == pytest.approx(top.values.tolist(), rel=1e-5)
        assert [token for token, _ in ranked] == [processor.tokenizer.decode([i]).strip() for i in top.indices.tolist()]
        assert judge.fill_mask(["The <mask> is shining."], top_k=4) == [ranked]


def test_embeddings_are_unit_rows_in_order(talker, filler, pictures):
    for judge in (talker, filler):
        images, texts = (
            judge.embed_image(pictures, batch_size=2),
            judge.embed_text(["a", "a longer text"], batch_size=1),
        )
        assert images.shape == (3, 16) and texts.shape == (2, 16)
        assert images.dtype == texts.dtype == torch.float32
        torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(judge.embed_image(pictures[1]), images[1:2])
        torch.testing.assert_close(judge.embed_text(["a", "a longer text"]), texts)
        with torch.no_grad():
            torch.testing.assert_close(judge.model.encode_image(judge.processor.pixels(pictures)), images)
            torch.testing.assert_close(judge.model.encode_text(**judge.processor.encode_text(["a"])), texts[:1])
    assert talker.embed_image([]).shape == (0, 16)


def test_classification_is_a_softmax_over_scaled_similarity(talker, pictures):
    labels = ["cat", "dog", "red car"]
    scores = (
        talker.model.logit_scale.exp().item()
        * talker.embed_image(pictures)
        @ talker.embed_text([f"a photo of {label}" for label in labels]).T
    )
    for row, named in enumerate(talker.classify(pictures, labels, template="a photo of {}")):
        assert list(named) == labels
        assert list(named.values()) == pytest.approx(scores[row].softmax(-1).tolist(), rel=1e-4)
    assert talker.classify(pictures[0], ["cat"]) == {"cat": pytest.approx(1.0)}


def test_nothing_is_printed_or_warned(talker, filler, pictures, capfd, recwarn):
    messages = user_turn(pictures[:1], "What?")
    talker.generate([messages, messages], max_new_tokens=3)
    talker.generate(messages, max_new_tokens=3, temperature=0.5, top_k=5, top_p=0.9, seed=0)
    talker.generate(messages, max_new_tokens=3, num_beams=2)
    list(talker.stream(messages, max_new_tokens=3))
    talker.complete("a", max_new_tokens=3)
    filler.fill_mask("a <mask>")
    talker.classify(pictures[0], ["a"])
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_calls_leave_nothing_on_the_modules(talker, filler, pictures):
    def attributes(judge: vlm.VLM) -> dict[str, set[str]]:
        return {name: set(vars(module)) for name, module in judge.model.named_modules()}

    for judge in (talker, filler):
        before, config = attributes(judge), judge.model.generation_config.to_dict()
        judge.embed_image(pictures)
        judge.embed_text("a")
        judge.fill_mask("a <mask>")
        if judge is talker:
            judge.caption(pictures, max_new_tokens=2)
            judge.loglikelihood([[*user_turn([], "a"), {"role": "assistant", "content": "b"}]])
        assert attributes(judge) == before and judge.model.generation_config.to_dict() == config


def test_new_tokens_stop_where_the_positions_end(make_model, make_processor):
    """GPT-2 has learned positions and nothing beyond them."""
    short = vlm.VLM(make_model("gpt2"), make_processor())
    assert short.complete("a" * 250, max_new_tokens=64) == short.complete("a" * 250, max_new_tokens=6)


# The edges


def test_a_text_that_the_assistant_opens_has_a_likelihood(make_model, make_processor):
    model = vlm.VLM(make_model(), make_processor())
    ((told, tokens),) = model.loglikelihood([[{"role": "assistant", "content": "hi"}]])
    assert told < 0 and tokens == 3, "two letters and the end"


def test_a_long_neighbour_cuts_no_reply_short(make_model, make_processor):
    model = vlm.VLM(make_model(), make_processor())
    alone = model.complete("hello", max_new_tokens=40)
    together = model.complete(["hello", "a" * 250], max_new_tokens=40)
    assert together == [alone, model.complete("a" * 250, max_new_tokens=40)]


def test_what_the_processor_pads_can_be_generated_from(make_model, make_processor):
    processor, model = make_processor(), make_model()
    turns = [[{"role": "user", "content": text}] for text in ("hi", "a longer question")]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(turns, **options)
    together = model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    for turn, reply in zip(turns, together, strict=True):
        inputs = processor.apply_chat_template(turn, **options)
        alone = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        assert reply.tolist()[: len(alone)] == alone.tolist()


# Matching


def test_match_says_how_likely_a_text_goes_with_a_picture(make_model, make_processor, pictures):
    model = make_model(gate_init=1.0)
    model.add_matching_head()
    judge = vlm.VLM(model, make_processor())
    texts = ["a cat", "something rather longer", "no"]
    together = judge.match(pictures, texts)
    alone = [judge.match(picture, text) for picture, text in zip(pictures, texts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6) and together == judge.match(pictures, texts, batch_size=2)
    ids = torch.tensor([judge.processor.tokenizer.encode("no") + [1]])
    pixels = judge.processor.pixels([pictures[2]])
    with torch.no_grad():
        states = model.states(
            ids, pixel_values=pixels, image_slots=torch.tensor([[0]]), token_image=torch.zeros_like(ids)
        ).last_hidden_state
        logits = states.mean(dim=1) @ model.matching_head.weight.T + model.matching_head.bias
    assert alone[2] == pytest.approx(logits.double().softmax(dim=-1)[0, 1].item(), abs=1e-6)
    assert judge.match(pictures[0], "no") != pytest.approx(alone[2], abs=1e-6), "it does not look"
