"""What an official benchmark is: a declaration of its layout, its prompt, how answers are read and what they are worth.

Knows how examples become items and where each part of a declaration is used. Knows nothing of any one benchmark, nor of
how a model is loaded or results are written. `eval/TASKS.md` shows how one is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from ..metrics.vqa import clean
from ..pictures import Gallery
from .base import Asking, Item, Scored, Shot, Task, Writing, letter
from .reading import check_there

CAPTION_PROMPT = "{caption_prompt}"


@dataclass(frozen=True)
class Example:
    """One line of a benchmark: pictures not yet opened, what is asked about them, and what is right.

    images: paths, bytes, or functions that give a picture. answers: every right answer; of a choice the letter; none
    where the benchmark keeps them to itself. context: what is told before the question. about: what only the metric reads.
    """

    id: int | str
    images: tuple[Any, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    context: str = ""
    type: str | None = None
    key: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


# A folder as the benchmark is downloaded -> its examples in their order. Raises UsageError for what is missing.
Reader = Callable[[Path], Iterable[Example]]
Metric = Callable[[Sequence[Item], Any], Scored]


def _cleaned(items: Sequence[Item], outputs: Sequence[str]) -> list[str]:
    return [clean(said) for said in outputs]


def _first_answer(example: Example) -> str:
    return example.answers[0]


@dataclass(frozen=True)
class Way:
    """One way to put a benchmark's questions.

    prompt: a template with {question}, {context}, {options} (a line each, lettered) and {caption_prompt} (the model's own).
    asking: what the model does. read: its outputs -> answers, as the metric takes them. reply: what it would have to say
    to be right, which an example shown before the question says.
    """

    prompt: str
    asking: Asking
    read: Callable[[Sequence[Item], Any], Any] = _cleaned
    reply: Callable[[Example], str] = _first_answer

    def ask(self, example: Example, caption_prompt: str) -> str:
        """The prompt filled in."""
        options = "\n".join(f"{letter(place)}. {option}" for place, option in enumerate(example.options))
        context = f"{example.context}\n" if example.context else ""
        return self.prompt.format(
            question=example.question, context=context, options=options, caption_prompt=caption_prompt
        )


@dataclass(frozen=True)
class Benchmark(Task):
    """A benchmark as it is published.

    ways: by name, the first is taken unless another is asked for. train: where examples to show come from, if the
    benchmark has such a split. submission: one item and its answer as an entry of the official result file.
    """

    name: str
    headline: str
    read: Reader
    ways: Mapping[str, Way]
    metric: Metric
    train: Reader | None = None
    submission: Callable[[Item, Any], dict[str, Any]] | None = None
    way_name: str = ""
    less_is_better: bool = False

    @property
    def way(self) -> Way:
        """How the questions are put."""
        return self.ways[self.way_name or next(iter(self.ways))]

    @property
    def asking(self) -> Asking:  # type: ignore[override]
        """What the model does with them."""
        return self.way.asking

    def by(self, way: str | None, prompt: str | None) -> Benchmark:
        """The same benchmark, put in another way or with another prompt. Raises UsageError for what it does not have."""
        if way is not None and way not in self.ways:
            raise UsageError(f"task {self.name} has no way {way!r} of choosing; it has {', '.join(self.ways)}")
        chosen = replace(self, way_name=way or next(iter(self.ways)))
        if prompt is None:
            return chosen
        asked = replace(chosen.way, prompt=_checked(prompt))
        return replace(chosen, ways={**self.ways, chosen.way_name: asked})

    def examples(self, data: Path, limit: int | None = None) -> list[Example]:
        """What the benchmark holds, found whole. Raises UsageError for files or pictures that are missing."""
        return examples_of(self.read, self.folder(data), self.name, limit)

    def folder(self, data: Path) -> Path:
        """Where the benchmark lies: in the folder of its name, if `data` has one, else in `data` itself."""
        return data / self.name if (data / self.name).is_dir() else data

    def items(
        self, examples: Sequence[Example], caption_prompt: str, shots: Mapping[int | str, Sequence[Example]]
    ) -> tuple[list[Item], list[Gallery]]:
        """What is asked, and the distinct pictures that it is asked about. shots: id -> examples shown first."""
        places: dict[Any, int] = {}
        galleries: list[Gallery] = []
        items = []
        for example in examples:
            if example.images not in places:
                places[example.images] = len(galleries)
                galleries.append(Gallery(_key(example), example.images))
            before = tuple(self._shot(one, caption_prompt) for one in shots.get(example.id, ()))
            items.append(
                Item(
                    id=example.id,
                    sample=places[example.images],
                    key=_key(example),
                    prompt=self.way.ask(example, caption_prompt),
                    references=example.answers,
                    type=example.type,
                    options=example.options,
                    shots=before,
                    images=tuple(str(image) for image in example.images if isinstance(image, Path)),
                    about=example.about,
                )
            )
        return items, galleries

    def _shot(self, example: Example, caption_prompt: str) -> Shot:
        return Shot(example.id, self.way.ask(example, caption_prompt), self.way.reply(example), example.images)

    def score(self, items: Sequence[Item], outputs: Any) -> Scored:
        """The metric of the answers read from the outputs; only the answers where none of the right ones are public."""
        answers = self.way.read(items, outputs)
        public = any(item.references for item in items)
        scored = self.metric(items, answers) if public else Scored({}, answers, [None] * len(items))
        if len(self.ways) > 1:  # a number by one way says nothing about a number by another
            scored = replace(scored, metrics=scored.metrics | {"choice": self.way_name or next(iter(self.ways))})
        if self.submission is None:
            return scored
        official = [self.submission(item, answer) for item, answer in zip(items, answers, strict=True)]
        return replace(scored, official=official)


def written(prompt: str, max_new_tokens: int, **more: Any) -> dict[str, Way]:
    """The one way of a benchmark whose answers are written out."""
    return {"generate": Way(prompt, Writing(max_new_tokens), **more)}


def examples_of(read: Reader, folder: Path, name: str, limit: int | None = None) -> list[Example]:
    """The first `limit` examples in a folder, their pictures found to be there. Raises UsageError, with the numbers."""
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder; give the one that {name} was downloaded to")
    try:
        examples = list(islice(read(folder), limit))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, NotADirectoryError) as error:
        raise UsageError(
            f"{folder}: an entry of {name} is not as published ({type(error).__name__}: {error}); download it again"
        ) from None
    if not examples:
        raise UsageError(f"{folder}: 0 examples of {name} are in it; download it again")
    check_there(
        folder, (image for one in examples for image in one.images if isinstance(image, Path)), f"pictures of {name}"
    )
    return examples


def _key(example: Example) -> str:
    if example.key:
        return example.key
    first = example.images[0] if example.images else None
    return first.name if isinstance(first, Path) else str(example.id)


def _checked(prompt: str) -> str:
    try:
        prompt.format(question="", context="", options="", caption_prompt="")
    except (KeyError, IndexError, ValueError):
        raise UsageError(
            f"prompt {prompt!r} is no template; use {{question}}, {{context}}, {{options}} and {{caption_prompt}} in it"
        ) from None
    return prompt
