"""The model as lmms-eval sees it: conversations with pictures, or a prompt and its pictures.

Knows that harness's requests and how it looks up a task's documents. Knows nothing of its metrics, but for the sign in
which they take likelihoods.

    lmms-eval --model vlm --model_args pretrained=OUT/model --tasks mme

finds `manifest` by the entry point `lmms_eval.models`. Tasks by likelihood are asked with `--force_simple`, for the harness
has conversations for generation only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from vlm.api import user_turn
from vlm.errors import UsageError
from vlm.processing import pictures_of

from . import Row, batch_of, opened, weigh, write

Messages = list[dict[str, Any]]
# What makes a conversation when its turn has come, for the pictures of a whole task are not held at once; and the settings
# of its reply.
Asked = tuple[Callable[[], Messages], dict[str, Any]]


class SimpleModel(lmms):
    """A model folder or hub id for lmms-eval, asked with a prompt and pictures: they stand before it, in a user's turn.

    pretrained, device, dtype, adapter: as in `vlm.load`. Raises UsageError for what it refuses, for encoder families, and
    for what is not a picture.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        adapter: str | None = None,
        batch_size: int | str = 32,
    ) -> None:
        super().__init__()
        self.batch_size = batch_of(batch_size)
        self.loaded = opened(pretrained, device, dtype, adapter)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The reply to each request, up to the first of its stop texts."""

        def put(makers: list[Callable[[], Messages]], **options: Any) -> list[str]:
            parts = self._parts(makers)
            return [reply for part in parts for reply in self._generate([make() for make in part], **options)]

        return write([self._asked(request.args) for request in requests], put)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """For each request its replies, round by round, until the task says that it is over."""
        return [self._rounds(request.args) for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """How likely each reply is, the end of its turn included, and whether greedy decoding gives it.

        The harness takes the *least* number of a multiple choice as the model's choice, for its own models hand over a
        loss. So a choice gets -log p, and a target that is no choice gets log p (natural, summed over tokens). The pair of
        number and bool is the `text` of what is returned.
        """
        signs = [self._sign(request.args) for request in requests]
        weighed: list[tuple[float, bool]] = []
        for part in self._parts(requests):
            weighed += weigh(self.loaded, [self._row(request.args) for request in part], self.batch_size)
        # The evaluator of 0.7 turns a bare pair into a string before any metric sees it.
        pairs: list[Any] = [(sign * told, greedy) for sign, (told, greedy) in zip(signs, weighed, strict=True)]
        return [GenerationResult(pair) for pair in pairs]

    def _sign(self, arguments: tuple[Any, ...]) -> int:
        if len(arguments) == 2:
            raise UsageError("acc_mutual_info asks for choices without their question and picture; choose acc")
        return 1 if callable(arguments[1]) else -1  # choices come written out

    def _row(self, arguments: tuple[Any, ...]) -> Row:
        context, target, visuals, *place = arguments
        document = self._document(*place)
        reply = str(target(document) if callable(target) else target)
        messages = [*_turn(visuals(document), context), {"role": "assistant", "content": reply}]
        return (*self.loaded.processor.encode_dialogue(messages), pictures_of(messages))

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        context, wanted, visuals, *place = arguments
        return lambda: _turn(visuals(self._document(*place)), context), wanted

    def _rounds(self, arguments: tuple[Any, ...]) -> list[str]:
        context, wanted, visuals, text, *place = arguments
        document = self._document(*place)

        def following(**before: Any) -> tuple[Messages, bool, Any]:
            pictures, words, over, _, told = text(document, **before)
            return ([] if over else _turn(pictures, words)), over, told

        return self._play(_turn(visuals(document), context), wanted, following)

    def _play(self, turns: Messages, wanted: Any, following: Callable[..., tuple[Messages, bool, Any]]) -> list[str]:
        """The replies to the turns, and to those that follow them round by round."""
        replies: list[str] = []
        over, told = False, None
        while not over:
            replies += write([(turns, wanted)], self._generate)
            before = {"round_idx": len(replies), "previous_output": list(replies), "previous_round_info": told}
            turns, over, told = following(**before)
        return replies

    def _generate(self, conversations: list[Messages], **options: Any) -> list[str]:
        return self.loaded.generate(conversations, batch_size=self.batch_size, **options)

    def _parts(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        return (items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size))

    def _document(self, number: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]


class ChatModel(SimpleModel):
    """The same, asked with whole conversations."""

    is_simple = False

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        _, messages, wanted, *place = arguments
        return lambda: _conversation(messages(self._document(*place))), wanted

    def _rounds(self, arguments: tuple[Any, ...]) -> list[str]:
        _, messages, wanted, *place = arguments
        document = self._document(*place)

        def following(**before: Any) -> tuple[Messages, bool, Any]:
            turns, over, _, told = messages(document, **before)
            return ([] if over else _conversation(turns)), over, told

        return self._play(_conversation(messages(document)), wanted, following)


def manifest() -> Any:
    """What the entry point gives, a `ModelManifest`: the model by name, and the class for each way of asking."""
    # The package of this import reads the entry points when it is first imported, which must not be before this file is.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlm", f"{__name__}.SimpleModel", f"{__name__}.ChatModel")


def _turn(pictures: Sequence[Any] | None, text: str) -> Messages:
    return user_turn(pictures or [], text)


def _conversation(messages: Messages) -> Messages:
    """The harness's conversation, whose pictures stand under `url`, as one of ours."""
    return [{"role": turn["role"], "content": [_part(part) for part in turn["content"]]} for turn in messages]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise UsageError(f"a conversation has a part of type {part['type']!r}; this model takes text and pictures")
    return {"type": "image", "image": part["url"]}
