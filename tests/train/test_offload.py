"""What lies in the host's memory trains as what does not; what no ZeRO stage moves there, or no disk takes, is refused."""

from __future__ import annotations

import pytest
import torch

from vlm.errors import UsageError
from vlm.train import deepspeed_config as module
from vlm.train.deepspeed_config import deepspeed_config

CPU = {"device": "cpu"}
JOINT = {"objective": "joint", "steps": 3}
MOVED = [
    (2, {"offload_optimizer": CPU}),
    (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    (3, {"offload_param": CPU}),
]


@pytest.mark.parametrize(("zero", "section"), MOVED)
def test_an_offloaded_run_is_the_other_one(run, zero, section):
    watched = {"zero": zero, "watch": {"every": 1}, "checkpoint": {"every": 2}}
    kept = run(JOINT, into="kept", **watched)
    moved = run(JOINT, into="moved", **watched, deepspeed={"zero_optimization": section})
    assert moved.losses == pytest.approx(kept.losses, rel=1e-5) and len(moved.losses) == 3
    for mine, theirs in zip(moved.steps, kept.steps, strict=True):
        assert mine["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-4)
    expected = kept.weights()
    assert all(torch.allclose(value, expected[name], atol=1e-5) for name, value in moved.weights().items())


@pytest.mark.parametrize(
    ("zero", "name", "told"),
    [
        (0, "offload_optimizer", "offload_optimizer.device is cpu, which zero 0 does not do; use zero 1 or 2 or 3"),
        (2, "offload_param", "offload_param.device is cpu, which zero 2 does not do; use zero 3"),
    ],
)
def test_a_stage_that_does_not_offload_is_refused(make_config, tmp_path, zero, name, told):
    config = make_config(tmp_path, JOINT, zero=zero, deepspeed={"zero_optimization": {name: CPU}})
    with pytest.raises(UsageError, match=told):
        deepspeed_config(config, config.stages[0], 1)


@pytest.mark.parametrize("builds", [True, False])
def test_a_disk_is_passed_on_where_it_can_be_used(make_config, tmp_path, monkeypatch, builds):
    monkeypatch.setattr(module.AsyncIOBuilder, "is_compatible", lambda *_, **__: builds)
    disk = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": "auto"}
    config = make_config(tmp_path, JOINT, zero=3, deepspeed={"zero_optimization": {"offload_param": disk}})
    if builds:
        told = deepspeed_config(config, config.stages[0], 1)["zero_optimization"]
        assert told == {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
        return
    with pytest.raises(
        UsageError, match="async_io does not build here; install libaio-dev and g\\+\\+, or offload to cpu"
    ):
        deepspeed_config(config, config.stages[0], 1)
