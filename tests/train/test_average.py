"""The moving average of the weights: the formula in float64, under every ZeRO stage, and nothing else changed by it."""

from __future__ import annotations

import math

import pytest
import torch

from vlm.errors import UsageError
from vlm.saving import read
from vlm.train.loop import train

STAGE = {"objective": "joint", "steps": 4, "lr": 0.01}
DECAY = 0.6


def weights_of(folder) -> dict:
    return read(folder)[0].state_dict()


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_it_is_the_formula(run, base, zero, precision):
    """Over the float32 masters after each step, as runs of so many steps leave them."""
    masters = {"deepspeed": {"bf16": {"enabled": True}}} if precision == "bf16" else {}
    settings = {"zero": zero, "precision": precision} | masters
    stage = STAGE | {"schedule": "constant"}
    steps = [run(stage | {"steps": n}, into=f"{n}", **settings) for n in (1, 2, 3)]
    left = run(stage | {"steps": 3, "ema": DECAY}, into="averaged", **settings)
    assert left.losses == steps[-1].losses, "training knows nothing of it"
    after, averaged, moved = [one.weights() for one in steps], left.weights(), 0
    for name, start in weights_of(base).items():
        trains = not torch.equal(after[0][name], start)
        # DeepSpeed's masters are born from the weights in bf16.
        expected = (start.bfloat16() if masters and trains else start).double()
        for weights in after:
            expected = DECAY * expected + (1 - DECAY) * weights[name].double()
        assert torch.allclose(averaged[name].double(), expected, rtol=1e-6, atol=1e-7), name
        moved += not torch.allclose(averaged[name], after[-1][name], rtol=1e-4, atol=1e-4)
    assert moved > 20, "the average is not the last step"


def test_validation_judges_the_average_and_disturbs_nothing(run, pairs):
    """Under ZeRO-3, where weights must go apart and come together again for it."""
    stage, zero = STAGE | {"ema": DECAY, "micro_batch": 2, "steps": 3}, 3
    validation = {"every": 1, "samples": 12, "keep_best": True}
    judged = run(stage, into="judged", zero=zero, data={"val": pairs}, validation=validation)
    plain = run(stage, into="plain", zero=zero)
    assert judged.losses == plain.losses
    weights = plain.weights()
    assert all(torch.equal(weights[name], value) for name, value in judged.weights().items())
    # A stage that starts from what was left, and learns nothing, finds the same loss.
    last = judged.events("validation")[-1]
    again = run(
        STAGE | {"steps": 1, "lr": 1e-12},
        into="again",
        model={"path": str(judged.out / "model")},
        data={"val": pairs},
        validation=validation,
    )
    assert math.isclose(again.events("validation")[0]["loss"], last["loss"], rel_tol=1e-5)


def test_a_state_without_an_average_cannot_give_one(run, make_config, tmp_path):
    left = run(STAGE, checkpoint={"every": 2})
    (left.out / "checkpoints" / "latest").write_text("stage0-step2\n")
    with pytest.raises(UsageError, match="stage0-step2 was written without ema, and the stage has ema 0.6; remove it"):
        train(make_config(left.out, STAGE | {"ema": DECAY}), resume=True)


def test_weights_that_are_swapped_to_disk_have_none(run, tmp_path):
    swapped = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    with pytest.raises(UsageError, match="^ema 0.6 averages weights in memory, and .* nvme; remove one"):
        run(STAGE | {"ema": DECAY}, zero=3, deepspeed=swapped)
