"""The tasks of `vlm eval` by name: on shards (`shards.py`), and the official benchmarks, a module a family.

Knows which there are, and nothing of what they do. `eval/TASKS.md` shows how one is added.
"""

from . import captions, documents, gqa, language, multiple_choice, retrieval, vqa, yes_no, zero_shot
from .base import Item, Scored, Task
from .benchmark import Benchmark, Example
from .shards import SHARD_TASKS, ShardTask

__all__ = ["FAMILIES", "TASKS", "Benchmark", "Example", "Item", "Scored", "ShardTask", "Task"]

FAMILIES = (vqa, gqa, yes_no, multiple_choice, documents, captions, retrieval, zero_shot, language)
_BENCHMARKS: list[Benchmark] = [benchmark for family in FAMILIES for benchmark in family.BENCHMARKS]
TASKS: dict[str, Task] = {task.name: task for task in (*SHARD_TASKS, *_BENCHMARKS)}
