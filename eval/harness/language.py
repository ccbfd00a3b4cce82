"""The model as lm-evaluation-harness sees it: text alone, as its adapters are taught and tested.

Knows that harness's requests. Knows nothing of pictures, and of the harness's tasks only what a request carries.

    python -m vlm.eval.harness.language run --model vlm --model_args pretrained=OUT/model --tasks lambada_openai

is the harness's own command with `vlm` among its models; it has no entry point by which to find one. It asks for a GPU
unless `--device cpu` says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from vlm.errors import RunError, UsageError

from . import Row, batch_of, opened, weigh, write

LENGTH = 2048  # the harness's own, for a language model that names no limit


@register_model("vlm")
class TextModel(TemplateLM):
    """A model folder or hub id for lm-evaluation-harness. Prompts are plain text: control tokens in them are broken up.

    pretrained, device, dtype, adapter: as in `vlm.load`. max_length: how many tokens one prediction may look back on;
    the default is all that the language model has positions for but one, which the predicted token takes.
    Of a longer text the end is read. Raises UsageError for what `vlm.load` refuses, and for encoder families.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        adapter: str | None = None,
        batch_size: int | str = 32,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_of(batch_size)
        self.loaded = opened(pretrained, device, dtype, adapter)
        room = (self.loaded.model.max_tokens or LENGTH + 1) - 1
        self.max_length = room if max_length is None else max_length
        if not 1 <= self.max_length <= room:
            raise UsageError(f"max_length is {self.max_length}; it must be at least 1 and at most {room}")
        self.tokenizer = self.loaded.processor.tokenizer

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text follows: bos, or eos where there is none."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of plain text, with the tokenizer's own bos unless told otherwise."""
        special = add_special_tokens is not False
        return self.tokenizer.encode(self.loaded.processor.plain(string), add_special_tokens=special)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log p of the second ids of each request after the first, and whether greedy decoding gives them."""
        rows: list[Row] = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-self.max_length - 1 :]
            first = max(1, len(ids) - len(continuation))
            rows.append((ids, [place >= first for place in range(len(ids))], []))
        return weigh(self.loaded, rows, self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log p of each whole text, read in windows of `max_length` tokens."""
        texts = [request.args[0] for request in requests]
        weighed = self.loaded.loglikelihood_rolling(texts, window=self.max_length, batch_size=self.batch_size)
        return [told for told, _ in weighed]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What each prompt goes on with, up to the first of its stop texts."""

        def put(prompts: list[str], **options: Any) -> list[str]:
            ends = [self._end(prompt, options["max_new_tokens"]) for prompt in prompts]
            return self.loaded.complete(ends, batch_size=self.batch_size, **options)

        return write([request.args for request in requests], put)

    def _end(self, prompt: str, new: int) -> str:
        """The end of a prompt that leaves room for `new` tokens, as the harness's own models cut it."""
        room = self.max_length - new
        if room < 1:
            raise UsageError(f"max_gen_toks is {new} and max_length is {self.max_length}; ask for fewer")
        ids, drop = self.tok_encode(prompt), 0
        text = prompt
        # What is left may fall into more tokens than it was cut from.
        while len(self.tok_encode(text)) > room:
            text = self.tokenizer.decode(ids[len(ids) - room + drop :], skip_special_tokens=True).lstrip("\ufffd")
            drop += 1
        return text


def main() -> None:
    """The harness's command line. Exit codes as of `vlm`: 2 for what the caller can mend, 1 for a run that failed."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
