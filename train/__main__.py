"""`python -m vlm.train`: one rank, as `vlm train`, `deepspeed --module vlm.train` and `torchrun -m vlm.train` start it.

Knows those launchers' arguments. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import gc
import sys

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from vlm.errors import RunError, UsageError

from .allocator import keep_freed_memory
from .config import load_config
from .loop import train

EXAMPLE = "deepspeed --num_gpus 8 --module vlm.train --config configs/pretrained.yaml data.train=SHARDS out=runs/mine"


def main(arguments: list[str] | None = None) -> int:
    """Run one rank; returns the exit code. Errors are one line, or, under `vlm train`, told to the launcher alone."""
    parser = argparse.ArgumentParser(prog="vlm.train", description="Train a model.", epilog=f"example: {EXAMPLE}")
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a packaged one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="from the launcher; its environment says the same"
    )
    parser.add_argument("--deepspeed", action="store_true", help="accepted for the sake of habit; it is always on")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="the same as deepspeed=JSON")
    parser.add_argument("--launched", metavar="COMMAND", help=argparse.SUPPRESS)  # what was typed to start the ranks
    given = parser.parse_intermixed_args(arguments)
    gc.freeze()  # what is imported stays; on each rank its turn to look through it comes at another moment, and all wait
    keep_freed_memory()
    if given.deepspeed_config:
        given.overrides.append(f"deepspeed={given.deepspeed_config}")
    handler = get_error_handler()
    try:
        train(load_config(given.config, given.overrides), resume=given.resume, command=given.launched)
    except (UsageError, RunError) as error:
        handler.record_exception(error)
        if not given.launched:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        handler.record_exception(error)
        if not given.launched:
            raise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
