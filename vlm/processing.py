"""From pictures and words to the tensors a `VLMModel` takes, and back to words.

Knows the tokenizer, the chat template and the vision tower's transform. Knows nothing of the model's weights, shards or training.

Shapes: B rows, L tokens, n pictures of the whole batch, M picture slots a row, H × W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from vlm.errors import UsageError
from vlm.images import open_image

PAD, EOS, IMAGE, MASK, USER, ASSISTANT = "<pad>", "<eos>", "<image>", "<mask>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer, in place, the special tokens and the chat template it lacks; what it has is kept."""
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    wanted = [IMAGE]
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        wanted += [USER, ASSISTANT]
    missing = [token for token in wanted if token not in control_tokens(tokenizer)]
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    return tokenizer


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are never made of a person's text as it stands, and their ids."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


class VLMImageProcessor(BaseImageProcessor):
    """Pictures to pixels, by the timm transform of the vision tower.

    input_size: (3, H, W). interpolation, mean, std, crop_pct, crop_mode: as in `timm.data.create_transform`;
    crop_mode "squash" keeps the whole picture and bends its aspect, "center" cuts, "border" pads.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        input_size: Sequence[int] = (3, 224, 224),
        interpolation: str = "bicubic",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        crop_pct: float = 1.0,
        crop_mode: str = "squash",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.input_size = list(input_size)
        self.interpolation = interpolation
        self.mean, self.std = list(mean), list(std)
        self.crop_pct, self.crop_mode = crop_pct, crop_mode

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """One picture or a list of them -> {"pixel_values": (n, 3, H, W) float32, normalised}."""
        return self.preprocess(images, return_tensors, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """As `__call__`."""
        listed = images if isinstance(images, (list, tuple)) else [images]
        transform = _transform(
            tuple(self.input_size),
            self.interpolation,
            tuple(self.mean),
            tuple(self.std),
            self.crop_pct,
            self.crop_mode,
        )
        pixels = torch.stack([transform(open_image(image)) for image in listed])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


@lru_cache(maxsize=16)
def _transform(
    input_size: tuple[int, ...],
    interpolation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_pct: float,
    crop_mode: str,
) -> Callable[[Image.Image], Tensor]:
    """The timm transform of these settings. It holds nothing of a picture, and a small one costs less than making it anew."""
    return create_transform(
        input_size, interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, crop_mode=crop_mode
    )


class VLMProcessor(ProcessorMixin):
    """Tokenizer, chat template and image transform of one model.

    caption_prompt: what a user turn says when it asks for a caption.
    """

    def __init__(
        self,
        image_processor: VLMImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        caption_prompt: str = "Describe the picture.",
        **kwargs: Any,
    ) -> None:
        if tokenizer is None:
            raise UsageError("a VLMProcessor needs a tokenizer; load one with from_pretrained")
        complete_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.caption_prompt = caption_prompt
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.mask_token = tokenizer.mask_token
        self.mask_token_id = tokenizer.mask_token_id

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        tokens = sorted({*control_tokens(self.tokenizer), IMAGE, USER, ASSISTANT}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)))

    def plain(self, text: str) -> str:
        """Text in which no control token is left: what would be one gets a space after its first character."""
        return self._control_tokens.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    @cached_property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a reply: eos, and whatever control token the chat template closes an assistant turn with."""
        ids, targets = self.encode_dialogue([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        control = set(control_tokens(self.tokenizer).values())
        closing = [index for index, is_target in zip(ids, targets, strict=True) if is_target and index in control]
        return sorted({self.tokenizer.eos_token_id, *closing[-1:]})

    # Tensors for the model

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Text with `<image>` places, and the pictures for them.

        images: one picture, a list for one text, or a list of lists for several texts; each place takes one, in order.
        Returns input_ids and attention_mask (B, L), left-padded unless `padding_side` says otherwise, and with pictures
        pixel_values (n, 3, H, W) and image_slots (B, M), the flat index of each row's pictures, -1 where a slot is empty.
        Raises UsageError where places and pictures differ.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        rows = _rows_of_images(images, len(texts))
        if len(rows) != len(texts):
            raise UsageError(f"{len(rows)} lists of pictures came with {len(texts)} texts; give one list for each text")
        for words, pictures in zip(texts, rows, strict=True):
            check_places(words, len(pictures))
        kwargs.setdefault("add_special_tokens", False)
        kwargs.setdefault("padding_side", "left")  # what is generated goes on from the last token of every row
        data = dict(self.tokenizer(texts, return_tensors=return_tensors, padding=padding, **kwargs))
        data.pop("token_type_ids", None)
        flat = [picture for pictures in rows for picture in pictures]
        if flat:
            data["pixel_values"] = self.pixels(flat)
            data["image_slots"] = slots_of([len(pictures) for pictures in rows])
        return BatchFeature(data)

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """n pictures (paths, PIL images, bytes or (H, W, 3) uint8 arrays) -> (n, 3, H, W) float32, normalised."""
        return self.image_processor(list(images))["pixel_values"]

    def encode_text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts for the contrastive space: input_ids and attention_mask (n, L), right-padded, each closed by eos."""
        closed = [self.plain(text) + self.tokenizer.eos_token for text in texts]
        encoded = self.tokenizer(
            closed, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    # Conversations

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in Hugging Face processors; pictures may be paths, PIL images, bytes or arrays, and are never fetched from a URL.

        A user's words never become control tokens. With tokenize=True and return_dict=True: what `__call__` returns.
        """
        tokenize, return_dict = kwargs.pop("tokenize", False), kwargs.pop("return_dict", False)
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = list(conversation) if batched else [conversation]
        options = {
            "return_tensors": kwargs.pop("return_tensors", "pt"),
            "padding": kwargs.pop("padding", True),
            **(kwargs.pop("processor_kwargs", None) or {}),
        }
        prompts = [self._render(messages, chat_template, **kwargs) for messages in conversations]
        if not tokenize:
            return prompts if batched else prompts[0]
        images = [pictures_of(messages) for messages in conversations]
        inputs = self(images=images, text=prompts, **options)
        return inputs if return_dict else inputs["input_ids"]

    def encode_dialogue(self, messages: Sequence[dict]) -> tuple[list[int], list[bool]]:
        """A whole conversation as token ids, and for each whether the model must produce it: assistant text and its end."""
        ids: list[int] = []
        targets: list[bool] = []
        done = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # Before an opening turn of the assistant stands nothing, and no template renders nothing.
            asked = self._render(messages[:turn], add_generation_prompt=True) if turn else ""
            answered = self._render(messages[: turn + 1])
            if not asked.startswith(done) or not answered.startswith(asked):
                raise UsageError(
                    "the chat template rewrites earlier turns, so answers cannot be told from prompts; "
                    "give the processor a chat template that only appends"
                )
            for piece, is_target in ((asked[len(done) :], False), (answered[len(asked) :], True)):
                piece_ids = self.tokenizer.encode(piece, add_special_tokens=False)
                ids += piece_ids
                targets += [is_target] * len(piece_ids)
            done = answered
        return ids, targets

    def _render(self, messages: Sequence[dict], chat_template: str | None = None, **kwargs: Any) -> str:
        kwargs.pop("load_audio_from_video", None)
        template = chat_template or self.chat_template
        plain = [self._plain_message(message, as_parts=IMAGE in template) for message in messages]
        return super().apply_chat_template(plain, chat_template=chat_template, tokenize=False, **kwargs)

    def _plain_message(self, message: dict, as_parts: bool) -> dict:
        """The message without control tokens. A template that never writes `<image>` was made for a language model alone and
        would lose or misprint a list of parts, so it gets one string with the `<image>` places in it."""
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self.plain(content)}
        if unknown := [part["type"] for part in content if part["type"] not in ("image", "text")]:
            raise UsageError(f"a message has a part of type {unknown[0]!r}; parts are of type 'image' or 'text'")
        parts: list[dict] = []
        for part in content:
            if part["type"] == "image":
                parts.append({"type": "image"})
            elif parts and parts[-1]["type"] == "text":
                # As one, or a control token could be put together from two.
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append({"type": "text", "text": part["text"]})
        parts = [{**part, "text": self.plain(part["text"])} if "text" in part else part for part in parts]
        if not as_parts:
            return {**message, "content": "".join(IMAGE if part["type"] == "image" else part["text"] for part in parts)}
        return {**message, "content": parts}

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_slots"]


def check_places(text: str, pictures: int) -> None:
    """UsageError where a text has not one `<image>` place for each of its pictures."""
    places = text.count(IMAGE)
    if places != pictures:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise UsageError(
            f"the text {shown!r} has {places} <image> places and {pictures} pictures came with it; "
            "give one picture for each place"
        )


def user_turn(images: Sequence[Any], text: str) -> list[dict[str, Any]]:
    """A conversation of one turn: the pictures, then what is asked about them."""
    pictures = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def pictures_of(messages: Iterable[dict]) -> list[Any]:
    """The pictures of a conversation in the order of their places. Raises UsageError for a URL or a part without a picture."""
    pictures = []
    for message in messages:
        if isinstance(message["content"], str):
            continue
        for part in message["content"]:
            if part["type"] != "image":
                continue
            picture = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
            if picture is None:
                raise UsageError("an image part names no picture; write {'type': 'image', 'image': PATH_OR_PICTURE}")
            if isinstance(picture, str) and picture.startswith(("http://", "https://")):
                raise UsageError(
                    f"{picture}: addresses are not fetched; download the picture and give its path or bytes"
                )
            pictures.append(picture)
    return pictures


def slots_of(counts: Sequence[int]) -> Tensor:
    """Pictures per row -> image_slots (B, M), for pictures that lie flat in order; M is at least 1."""
    slots = torch.full((len(counts), max(1, *counts)), -1)
    first = 0
    for row, count in enumerate(counts):
        slots[row, :count] = torch.arange(first, first + count)
        first += count
    return slots


def _rows_of_images(images: Any, rows: int) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(rows)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(row, (list, tuple)) for row in images):
        return [list(row) for row in images]
    if rows == 1:
        return [list(images)]
    return [[picture] for picture in images]
