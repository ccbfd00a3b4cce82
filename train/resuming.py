"""What a run that goes on may not change.

Knows what states and earlier stages depend on, and the config that a run left in OUT. Knows nothing of checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .checkpoint import Progress
from .config import Config, load_config

# Which parameters an optimizer has, in which groups and how split over ranks, and what the weights are.
OF_RUN = {"zero", "precision"}
OF_STAGE = {"objective", "loss", "train", "freeze", "lora", "optimizer"}
TERMS = "contrastive_weight", "matching_weight"  # of these, whether there is one


def check_resumed(config: Config, progress: Progress) -> None:
    """Raise UsageError for a run that is complete, and for a setting that is not what the run was begun with.

    Rates, batches and whatever else may differ: what the config says now is what the steps to come do.
    """
    out = Path(config.out)
    begun = load_config(out / "config.yaml")
    if len(config.stages) != len(begun.stages):
        raise UsageError(
            f"the recipe has {len(config.stages)} stages, and the run in {out} was begun with {len(begun.stages)}; resume with "
            f"these, and train further stages from its model, in another out"
        )
    if progress.stage == len(config.stages):
        raise UsageError(f"the run in {out} is complete; its model is {out / 'model'}, start anew without --resume")
    now, then = (dict(_leaves(_fixed(each, progress))) for each in (config, begun))
    for name in [*then, *now]:
        if now.get(name) != then.get(name):
            raise UsageError(
                f"{name} is {now.get(name)!r}, and the run in {out} was begun with {then.get(name)!r}; resume with that, or "
                "start anew"
            )


def _fixed(config: Config, progress: Progress) -> dict[str, Any]:
    fixed: dict[str, Any] = {"model": config.model.model_dump()}
    if progress.step:
        stage = config.stages[progress.stage]
        own = stage.model_dump(include=OF_STAGE) | {"rates": list(stage.rates)}
        own |= {f"{name} > 0": bool(getattr(stage, name)) for name in TERMS}
        fixed |= config.model_dump(include=OF_RUN) | {"stages": {str(progress.stage): own}}
    return fixed


def _leaves(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
