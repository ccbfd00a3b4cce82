"""METEOR and SPICE of captions, by the Java programs in the package pycocoevalcap. Knows how they are called.

Knows nothing of how they score. METEOR is Denkowski & Lavie 2014, SPICE Anderson et al. 2016; both run as coco-caption
runs them. SPICE fetches Stanford CoreNLP at its first use and wants 8 GB of memory.
"""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from vlm.errors import RunError, UsageError

from .caption import CaptionSet

JAVA_METRICS = ("METEOR", "SPICE")
_CLASSES = {"METEOR": "pycocoevalcap.meteor.meteor.Meteor", "SPICE": "pycocoevalcap.spice.spice.Spice"}


def java_scores(captions: CaptionSet, names: Sequence[str]) -> dict[str, tuple[float, list[float]]]:
    """Metric -> score of the set and of each picture, for those of `JAVA_METRICS` that `names` asks for.

    Raises UsageError where Java or the package is missing, RunError where a program fails.
    """
    scorers = {name: _scorer_class(name) for name in names}
    return {name: _score(name, scorer, captions) for name, scorer in scorers.items()}


def _scorer_class(name: str) -> Any:
    if shutil.which("java") is None:
        raise UsageError(f"{name} runs on Java, and no `java` is on the path; install a JRE or leave {name} out")
    module, _, attribute = _CLASSES[name].rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UsageError(f"{name} needs a package ({error}); `pip install 'vlm[java]'` or leave {name} out") from None


def _score(name: str, scorer: Any, captions: CaptionSet) -> tuple[float, list[float]]:
    references = {number: list(refs) for number, refs in enumerate(captions.references)}
    candidates = {number: [candidate] for number, candidate in enumerate(captions.candidates)}
    try:
        with redirect_stdout(sys.stderr):  # they print what they do, where the scores will stand
            score, each = scorer().compute_score(references, candidates)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RunError(f"{name}: its Java program failed ({' '.join(str(error).split())}); leave {name} out") from error
    scores = [one["All"]["f"] if isinstance(one, dict) else one for one in each]
    if not math.isfinite(score):
        raise RunError(f"{name}: its Java program gave {score} for {len(scores)} pictures; leave {name} out")
    return float(score), [float(one) for one in scores]
