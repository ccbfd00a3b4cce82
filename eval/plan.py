"""What a run asks: tasks, the data they are found in, and the ways of looking at its pictures.

Knows splits of shards and folders of benchmarks. Knows nothing of how anything is asked, kept, scored or written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.samples import Sample, said
from vlm.shards import INDEX, Shards

from . import pictures
from .tasks import TASKS, Benchmark, Example, Item, ShardTask, Task
from .tasks.shots import Shots

MAIN, MORE = "test", "test-*"
# The name of a set, and of each of its samples the key, the text and the unopened pictures.
HeldOut = tuple[str, Iterator[tuple[str, str | None, Sequence[Any]]]]


@dataclass(frozen=True)
class Settings:
    """How benchmarks are put. choice: the way in which options are chosen, None for each benchmark's first. prompt: a
    template in place of each benchmark's own. shots: examples shown first."""

    choice: str | None = None
    prompt: str | None = None
    shots: Shots = field(default_factory=Shots)

    def changed(self) -> dict[str, Any]:
        """What is not as it would be by itself, as JSON."""
        source = self.shots.source and str(self.shots.source)
        shots = asdict(self.shots) | {"source": source} if self.shots.count else None
        given = {"choice": self.choice, "prompt": self.prompt, "shots": shots}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Job:
    """One task on one set of data: what is asked, and the ways of looking at the pictures. place: what results call the
    data. unshuffled: it was to be shuffled too, but has no other pictures to show."""

    task: Task
    name: str
    place: str
    data: Path
    items: list[Item]
    looks: list[pictures.Look]
    unshuffled: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that a run is but its model: the same in every process."""

    names: tuple[str, ...]
    data: Path
    settings: Settings = field(default_factory=Settings)
    batch: int = 64
    limit: int | None = None
    blind: bool = True
    shuffled: bool = True

    def sources(self) -> list[Source]:
        """The data of all tasks, found whole. Raises UsageError for an unknown task, and for data that is missing."""
        tasks = [_task(name, self.settings) for name in dict.fromkeys(self.names)]
        if not tasks:
            raise UsageError(f"no task is given; choose some of {', '.join(TASKS)}")
        on_shards = tuple(task for task in tasks if isinstance(task, ShardTask))
        splits = find_splits(self.data) if on_shards else {}
        sources: list[Source] = [
            OnShards(on_shards, split, folder, Shards.open(folder).first(self.limit))
            for split, folder in splits.items()
        ]
        for task in tasks:
            if isinstance(task, Benchmark):
                sources.append(Downloaded(task, self.data, task.examples(self.data, self.limit)))
        return sources

    def held_out(self) -> Iterator[HeldOut]:
        """Every set that the run would ask about."""
        for source in self.sources():
            yield from source.held_out()

    def looks(self, samples: Sequence[pictures.Pictured], model: Any) -> list[pictures.Look]:
        """The ways of looking at samples: true, and as wanted blind and, where there is anything to shuffle, shuffled."""
        looks = [pictures.as_it_is(samples)]
        if self.blind:
            looks.append(pictures.blind(samples, pictures.zero_colour(model.processor)))
        if self.shuffled and (look := pictures.shuffled(samples)):
            looks.append(look)
        return looks

    def lacks_shuffled(self, looks: Sequence[pictures.Look]) -> bool:
        """Whether these looks are without the shuffled one that was wanted."""
        return self.shuffled and looks[-1].name != pictures.SHUFFLED


class Source(ABC):
    """Data that is opened, before any model is."""

    @abstractmethod
    def jobs(self, plan: Plan, model: Any) -> Iterator[Job]:
        """What is asked of the model about it. Raises UsageError for data that holds nothing for a task."""

    @abstractmethod
    def held_out(self) -> Iterator[HeldOut]:
        """As in `Plan`."""


@dataclass(frozen=True)
class OnShards(Source):
    """One split of shards, for all tasks on shards."""

    tasks: tuple[ShardTask, ...]
    split: str
    folder: Path
    samples: Sequence[Sample]

    def jobs(self, plan: Plan, model: Any) -> Iterator[Job]:
        looks = plan.looks(self.samples, model)
        for task in self.tasks:
            items = task.items(self.samples, model.processor.caption_prompt)
            if items:
                name = f"{task.name}@{self.split}" if self.split else task.name
                yield Job(task, name, self.split or "main", self.folder, items, looks, plan.lacks_shuffled(looks))
            elif not self.split:
                raise UsageError(
                    f"{self.folder}: no {task.needs} for task {task.name}; give other data or leave the task out"
                )

    def held_out(self) -> Iterator[HeldOut]:
        names = "+".join(task.name for task in self.tasks) + (f"@{self.split}" if self.split else "")
        yield names, ((sample.key, "\n".join(said(sample)) or None, sample.images) for sample in self.samples)


@dataclass(frozen=True)
class Downloaded(Source):
    """One benchmark as it was downloaded."""

    benchmark: Benchmark
    data: Path
    examples: list[Example]

    def jobs(self, plan: Plan, model: Any) -> Iterator[Job]:
        name, folder = self.benchmark.name, self.benchmark.folder(self.data)
        shots = plan.settings.shots.of(self.benchmark, self.examples, self.data, model, plan.batch)
        items, galleries = self.benchmark.items(self.examples, model.processor.caption_prompt, shots)
        pictured = any(gallery.images for gallery in galleries)
        looks = plan.looks(galleries, model) if pictured else [pictures.as_it_is(galleries)]
        yield Job(self.benchmark, name, name, folder, items, looks, pictured and plan.lacks_shuffled(looks))

    def held_out(self) -> Iterator[HeldOut]:
        yield (
            self.benchmark.name,
            ((str(one.key or one.id), _said(one), one.images) for one in self.examples),
        )


def _said(example: Example) -> str | None:
    return "\n".join(filter(None, [example.context, example.question, *example.options, *example.answers])) or None


def find_splits(data: Path) -> dict[str, Path]:
    """Split name -> folder or tar; the main one is called "". Raises UsageError where there is nothing to evaluate."""
    if not data.is_dir() or (data / INDEX).exists():
        return {"": data}
    if (data / MAIN).is_dir():
        more = sorted(path for path in data.glob(MORE) if path.is_dir())
        return {"": data / MAIN} | {path.name: path for path in more}
    found = sorted(path.parent.name for path in data.glob(f"*/{INDEX}"))
    mend = f"name one of them: {', '.join(found)}" if found else "make some with `vlm data convert`"
    raise UsageError(f"{data}: neither {INDEX} nor a folder {MAIN} is in it; {mend}")


def _task(name: str, settings: Settings) -> Task:
    if name not in TASKS:
        raise UsageError(f"task {name!r} is unknown; choose of {', '.join(TASKS)}")
    task = TASKS[name]
    if isinstance(task, Benchmark):
        return task.by(settings.choice, settings.prompt)
    if settings.changed():
        raise UsageError(
            f"task {name} has no {next(iter(settings.changed()))} to set; leave it out or name a benchmark"
        )
    return task
