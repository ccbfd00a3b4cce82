"""What a person calls: a loaded model that captions, answers, completes, fills in, embeds and classifies.

Knows how questions become conversations and conversations become batches. Knows nothing of shards, training, or how the
parts beneath work. Pictures are paths, PIL images, bytes or (H, W, 3) uint8 arrays; nothing is ever fetched from a URL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature

from vlm.errors import UsageError
from vlm.explain import Explanation
from vlm.explain import explain as explain_answer
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.request import Generation, Prompt
from vlm.inputs import as_list, check_length, filled, parts, picture_key
from vlm.likelihood import reply_likelihoods, text_likelihoods
from vlm.lora import load_lora, merge_lora
from vlm.model import VLMModel
from vlm.packed_linear import lay_out
from vlm.processing import MASK, VLMProcessor, check_places, pictures_of, user_turn
from vlm.quantization import check_scheme, is_quantized
from vlm.quantization import quantize as quantize_model
from vlm.saving import read

Messages = Sequence[dict[str, Any]]


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    adapter: str | Path | None = None,
    at_once: int = 1,
) -> VLM:
    """Load a model folder or a hub id, ready to be asked.

    device "auto": a CUDA GPU if there is one, else the CPU. dtype "auto": as saved. quantize: "int8" or "int4" quantizes the
    language model and the adapters as they are read; None, weights as saved, be they quantized or not.
    adapter: the OUT/adapter that training with LoRA left, put onto its base and merged; a quantized base, or one that was
    for the training and so becomes it again, has it beside.
    at_once: how many requests are decoded together, as a rule: above 1, float weights on a CPU are packed, which more than one
    row gains by and a single one loses (see `vlm.packed_linear.PackedLinear`; to train on, load for 1).
    Raises UsageError for a folder that is missing, of another kind, or broken, for another `quantize`, and for one to
    quantize that is quantized already.
    """
    if quantize is not None:
        check_scheme(quantize)
    place = _device(device)
    model, processor = read(path, dtype)
    if adapter is not None:
        load_lora(model, adapter)
        if not is_quantized(model):
            merge_lora(model)
        elif model.config.quantization["scheme"] == quantize:
            quantize = None  # as it was for the training
    if quantize is not None:
        quantize_model(model, quantize)
    model = model.to(place)
    lay_out(at_once, model.language_model, model.adapters)
    return VLM(model, processor)


class VLM:
    """A model and its processor, put in evaluation mode. Conversations are in `generate`'s form."""

    def __init__(self, model: VLMModel, processor: VLMProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self._own_engine: Engine | None = None
        self._own_engine_free = Lock()

    @property
    def lost(self) -> str | None:
        """What became of a process that holds the model with this one and has died; None while all is well."""
        return None

    # Text about pictures

    def caption(self, images: Any, prompt: str | None = None, **options: Any) -> Any:
        """Describe a picture (str), or each of a list of pictures (list of str).

        prompt: what to ask for; None asks as in training. options: as in `generate`.
        """
        listed = as_list(images)
        prompt = self.processor.caption_prompt if prompt is None else prompt
        texts = self.generate([user_turn([image], prompt) for image in listed], **options)
        return texts if isinstance(images, (list, tuple)) else texts[0]

    def answer(self, images: Any, question: str, **options: Any) -> Any:
        """Answer one question about a picture, or about a list of pictures together. options: as in `generate`.

        Many questions go faster as one `generate([user_turn(images, question), …])`.
        """
        return self.generate(user_turn(as_list(images), question), **options)

    def generate(self, messages: Any, *, batch_size: int = 32, n: int = 1, **options: Any) -> Any:
        """Continue a conversation (str), or each of a list of conversations (list of str), up to `batch_size` at once.

        A conversation is a list of turns `{"role": "user" | "assistant" | "system", "content": …}`; content is a string
        or a list of `{"type": "image", "image": …}` and `{"type": "text", "text": …}`. One conversation's keys and values
        are kept until the next call, so that its next turn is read from where it begins.
        n: with more than 1 each reply is a list of so many, the likeliest (a token, on average) first; they are drawn, or
        found by a search with at least as many beams.
        options: the fields of `Decoding` (max_new_tokens, temperature, top_k, top_p, num_beams, stop, seed, …).
        """
        decoding = _checked(Decoding(**options), n)
        if isinstance(messages, str):
            raise UsageError("generate takes conversations, not a string; use complete for plain text")
        conversations = [messages] if _is_conversation(messages) else list(messages)
        prompts = self._prompts([self._asked(conversation) for conversation in conversations], batch_size)
        replies = [
            [text.strip() for text in texts]
            for texts in self._replies(prompts, decoding, n, batch_size, len(conversations))
        ]
        told = replies if n > 1 else [texts[0] for texts in replies]
        return told[0] if _is_conversation(messages) else told

    def generate_each(
        self,
        conversations: Iterable[Messages],
        *,
        batch_size: int = 32,
        numbers: Iterable[int] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, str]]:
        """The replies that `generate` gives to many conversations, each with its number, in the order in which they end.

        Conversations are taken as there is room, at most two batches ahead of the replies, so that there may be any number
        of them and their pictures are opened late. numbers: those of the conversations, from 0 on where none are given; with
        a seed it is the number that a draw follows from, so that a share of many is answered as within all of them.
        options: the fields of `Decoding`.
        """
        prompts = self._prompts(map(self._asked, conversations), batch_size)
        for number, _, text in self._ended(prompts, Decoding(**options), 1, batch_size, batch_size, numbers):
            yield number, text.strip()

    def stream(self, messages: Messages, **options: Any) -> Iterator[str]:
        """The reply that `generate` gives, piece by piece as it is made, white space at its ends included. Stopping early
        stops the work.

        options: the fields of `Decoding`; one beam only.
        """
        decoding = Decoding(**options)
        if decoding.num_beams > 1:
            raise UsageError(f"num_beams is {decoding.num_beams}; only 1 can be streamed, use generate for more")
        return self._pieces(self.prompt(messages), _numbered(decoding, 0))

    def complete(self, prompt: Any, *, batch_size: int = 32, n: int = 1, **options: Any) -> Any:
        """Continue plain text, or each of a list of texts; only what is new is returned. n, options: as in `generate`."""
        decoding = _checked(Decoding(**options), n)
        texts = as_list(prompt)
        prompts = [self.text_prompt(text) for text in texts]
        added = self._replies(prompts, decoding, n, batch_size, len(prompts))
        told = added if n > 1 else [texts[0] for texts in added]
        return told if isinstance(prompt, (list, tuple)) else told[0]

    def prompt(self, messages: Messages) -> Prompt:
        """A conversation as tokens and pixels, for an engine."""
        return next(self._prompts([self._asked(messages)], 1))

    def text_prompt(self, text: str) -> Prompt:
        """Plain text to be continued as tokens, for an engine."""
        plain = self.processor.plain(filled(text, "prompt"))
        return Prompt(self.processor.tokenizer.encode(plain, add_special_tokens=True), continues=True)

    def engine(self, rows: int, length: int | None = None, **options: Any) -> Engine:
        """An engine for many requests at once; see `vlm.generation.engine.Engine`."""
        tokenizer, ends = self.processor.tokenizer, self.processor.end_token_ids
        return Engine(self.model, tokenizer, ends, rows=rows, length=length, **options)

    def explain(self, image: Any, question: str, **options: Any) -> Explanation:
        """Why it answers as it does: what each region of a picture and each word of a question is worth to the answer, and
        where it looks. options: as in `vlm.explain.explain` (grid, samples, seed, …)."""
        return explain_answer(self, image, question, **options)

    # Text alone

    @torch.no_grad()
    def fill_mask(self, text: Any, top_k: int = 5) -> Any:
        """The `top_k` likeliest (token, probability) for the one `<mask>` of a text, or of each of a list of texts.

        Encoder families predict the mask in its place. Decoder families read both ways and predict it from the position
        before it (LLM2Vec, BehnamGhader et al. 2024, section 2.2).
        """
        if top_k < 1:
            raise UsageError(f"top_k is {top_k}; it must be at least 1")
        ranked = [self._fill_one(one, top_k) for one in as_list(text)]
        return ranked if isinstance(text, (list, tuple)) else ranked[0]

    def loglikelihood(self, conversations: Sequence[Messages], *, batch_size: int = 32) -> list[tuple[float, int]]:
        """For each conversation the sum of log p (natural) of what the assistant says, turn ends included, and its tokens.

        Raises UsageError for a conversation without an assistant turn, and for encoder families.
        """
        return reply_likelihoods(self.model, self.processor, conversations, batch_size)

    def loglikelihood_rolling(
        self, texts: Sequence[str], *, window: int = 1024, batch_size: int = 32
    ) -> list[tuple[float, int]]:
        """For each plain text the sum of log p (natural) of all its tokens, and how many they are.

        The first token follows bos (eos where there is none). A text longer than `window` tokens is read in pieces of that
        many, each predicted from the token before it, the last with as much context as fits: the windows of EleutherAI's
        lm-evaluation-harness. Raises UsageError for a window below 1, and for encoder families.
        """
        return text_likelihoods(self.model, self.processor, texts, window, batch_size)

    # One space for pictures and text

    @torch.no_grad()
    def embed_image(self, images: Any, *, batch_size: int = 64) -> Tensor:
        """A picture, or a list of N -> (N, D) float32 on the CPU, each row of unit length."""
        rows = [torch.empty(0, self.model.config.embedding_dim)]
        for part in parts(as_list(images), batch_size):
            pixels = self.processor.pixels(part).to(self.model.device)
            rows.append(self.model.encode_image(pixels, normalize=False).float().cpu())
        return F.normalize(torch.cat(rows), dim=-1)

    @torch.no_grad()
    def embed_text(self, texts: str | Sequence[str], *, batch_size: int = 64) -> Tensor:
        """A text, or a list of N -> (N, D) float32 on the CPU, each row of unit length."""
        rows = [torch.empty(0, self.model.config.embedding_dim)]
        for part in parts([filled(text, "text") for text in as_list(texts)], batch_size):
            encoded = {name: tensor.to(self.model.device) for name, tensor in self.processor.encode_text(part).items()}
            check_length(self.model, encoded["input_ids"].shape[1])
            rows.append(self.model.encode_text(**encoded, normalize=False).float().cpu())
        return F.normalize(torch.cat(rows), dim=-1)

    def classify(self, images: Any, labels: Sequence[str], template: str = "{}") -> Any:
        """Label -> probability for a picture, or for each of a list: softmax of scale · cosine (CLIP, Radford et al. 2021).

        template: the sentence that each label is put into, "a photo of {}".
        """
        if not labels:
            raise UsageError("classify got 0 labels; give at least 1")
        texts = self.embed_text([template.format(label) for label in labels])
        scale = self.model.logit_scale.detach().float().exp().cpu()
        probabilities = (scale * self.embed_image(images) @ texts.T).softmax(dim=-1)  # (pictures, labels)
        named = [dict(zip(labels, row, strict=True)) for row in probabilities.tolist()]
        return named if isinstance(images, (list, tuple)) else named[0]

    @torch.no_grad()
    def match(self, images: Any, texts: Any, *, batch_size: int = 32) -> Any:
        """The probability (float) that a text goes with a picture, or of each of a list of texts with its picture of a list.

        Raises UsageError for a model that was not trained with `matching_weight`, and for lists of different lengths.
        """
        pictures, listed = as_list(images), [filled(text, "text") for text in as_list(texts)]
        if len(pictures) != len(listed):
            raise UsageError(
                f"match got {len(pictures)} pictures and {len(listed)} texts; give one text for each picture"
            )
        told: list[float] = []
        for part in parts(list(zip(pictures, listed, strict=True)), batch_size):
            encoded = self.processor.encode_text([text for _, text in part])
            check_length(self.model, encoded["input_ids"].shape[1])
            inputs = {name: tensor.to(self.model.device) for name, tensor in encoded.items()}
            pixels = self.processor.pixels([picture for picture, _ in part]).to(self.model.device)
            keys_values = self.model.picture_keys_values(self.model.image_states(pixels))
            own = torch.arange(len(part), device=self.model.device)[:, None]
            logits = self.model.match(**inputs, picture_keys_values=keys_values, image_slots=own)
            told += logits.float().softmax(dim=-1)[:, 1].tolist()
        return told if isinstance(texts, (list, tuple)) else told[0]

    # Beneath

    def _prompt(self, messages: Messages) -> str:
        if not messages or messages[-1].get("role") == "assistant":
            raise UsageError("a conversation must end with a user turn that asks something; add one")
        content = messages[-1]["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        filled("".join(texts), "question")
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _asked(self, messages: Messages) -> tuple[str, Sequence[Any]]:
        """A conversation as text with `<image>` places, and its pictures."""
        text, images = self._prompt(messages), pictures_of(messages)
        check_places(text, len(images))
        return text, images

    def _prompts(self, asked: Iterable[tuple[str, Sequence[Any]]], batch_size: int) -> Iterator[Prompt]:
        """Prompts with `<image>` places and the pictures of each. A picture that several name is prepared once a batch."""
        for part in parts(asked, batch_size):
            keyed = {picture_key(image): image for _, images in part for image in images}
            order = {key: index for index, key in enumerate(keyed)}
            pixels = self.processor.pixels(list(keyed.values())) if keyed else None
            for text, images in part:
                ids = self.processor.tokenizer.encode(text, add_special_tokens=False)
                own = None if pixels is None or not images else pixels[[order[picture_key(image)] for image in images]]
                yield Prompt(ids, own)

    def _replies(
        self, prompts: Iterable[Prompt], decoding: Decoding, n: int, batch_size: int, count: int
    ) -> list[list[str]]:
        """`n` texts for each of `count` prompts, best first."""
        found: list[list[tuple[float, str]]] = [[] for _ in range(count)]
        at_once = min(batch_size, count * _drawn(decoding, n))
        for place, worth, text in self._ended(prompts, decoding, n, batch_size, at_once):
            found[place].append((worth, text))
        return [[text for _, text in sorted(texts, key=lambda told: -told[0])] for texts in found]

    def _ended(
        self,
        prompts: Iterable[Prompt],
        decoding: Decoding,
        n: int,
        batch_size: int,
        at_once: int,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, float, str]]:
        """Replies as they end, `n` to each prompt: the prompt's number, what the reply is worth beside its like, its text."""
        drawn = _drawn(decoding, n)
        running: dict[Generation, int] = {}

        def step(engine: Engine) -> Iterator[tuple[int, float, str]]:
            for one in engine.step():
                if one.finish_reason is not None:
                    place = running.pop(one)
                    yield from ((place, worth, text) for worth, text in one.best(n))

        with self._engine_of(at_once * decoding.num_beams) as engine:
            for place, prompt in enumerate(prompts) if numbers is None else zip(numbers, prompts, strict=True):
                for number in range(place * drawn, place * drawn + drawn):
                    running[engine.add(prompt, _numbered(decoding, number))] = place
                while engine.waiting >= batch_size:
                    yield from step(engine)
            while running:
                yield from step(engine)

    def _pieces(self, prompt: Prompt, decoding: Decoding) -> Iterator[str]:
        with self._engine_of(1) as engine:
            reply = engine.add(prompt, decoding)
            while reply.finish_reason is None:
                engine.step()
                if piece := reply.take():
                    yield piece

    @contextmanager
    def _engine_of(self, rows: int) -> Iterator[Engine]:
        """An engine for one call. That of single requests is kept, with what it has read; one in use is not waited for."""
        if rows > 1 or not self._own_engine_free.acquire(blocking=False):
            yield self.engine(max(1, rows))
            return
        engine, self._own_engine = self._own_engine, None
        try:
            if engine is None or not engine.fits:
                engine = self.engine(1)
            try:
                yield engine
            except GeneratorExit:  # its reader has stopped between two steps
                self._keep(engine)
                raise
            self._keep(engine)  # one that anything else went through may be in any state
        finally:
            self._own_engine_free.release()

    def _keep(self, engine: Engine) -> None:
        engine.cancel_all()
        self._own_engine = engine

    def _fill_one(self, text: str, top_k: int) -> list[tuple[str, float]]:
        tokenizer, masked = self.processor.tokenizer, self.model.config.reading == "masked"
        pieces = text.replace(self.processor.mask_token, MASK).split(MASK)
        if len(pieces) != 2:
            raise UsageError(f"the text has {len(pieces) - 1} {MASK} places; fill_mask fills exactly 1")
        marked = self.processor.mask_token.join(self.processor.plain(piece) for piece in pieces)
        encoded = tokenizer([marked], return_tensors="pt")
        inputs = BatchFeature({name: encoded[name] for name in ("input_ids", "attention_mask")}).to(self.model.device)
        check_length(self.model, inputs["input_ids"].shape[1])
        place = int((inputs["input_ids"][0] == self.processor.mask_token_id).nonzero()[0])
        if not masked and place == 0:
            raise UsageError("a decoder predicts a mask from the token before it; put a word before <mask>")
        logits = self.model(**inputs, bidirectional=not masked).logits[0, place if masked else place - 1]
        probabilities, tokens = logits.float().softmax(dim=-1).topk(min(top_k, len(logits)))
        words = [tokenizer.decode([token], clean_up_tokenization_spaces=False).strip() for token in tokens.tolist()]
        return list(zip(words, probabilities.tolist(), strict=True))


def _checked(decoding: Decoding, n: int) -> Decoding:
    """The settings, where so many replies can come of them."""
    if n < 1:
        raise UsageError(f"n is {n}; it must be at least 1")
    if n > 1 and decoding.temperature == 0 and decoding.num_beams < n:
        raise UsageError(
            f"n is {n}, temperature is 0 and num_beams is {decoding.num_beams}: the replies would be the same; "
            f"raise temperature, or num_beams to {n}"
        )
    return decoding


def _drawn(decoding: Decoding, n: int) -> int:
    """How many requests `n` replies take: each is drawn by itself, or one search finds them all."""
    return 1 if decoding.num_beams > 1 else n


def _numbered(decoding: Decoding, number: int) -> Decoding:
    """The settings of the request with that number: equal prompts draw different replies, and always the same ones."""
    if decoding.seed is None:
        return decoding
    return replace(
        decoding, seed=int(np.random.SeedSequence([decoding.seed, number]).generate_state(1, np.uint64)[0] >> 1)
    )


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; choose auto, cpu, cuda or cuda:INDEX") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {str(device)!r} was asked for and no CUDA GPU is there; choose cpu")
    return place


def _is_conversation(messages: Any) -> bool:
    return bool(messages) and isinstance(messages[0], dict)
