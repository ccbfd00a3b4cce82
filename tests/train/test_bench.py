"""`vlm bench train` on tiny shapes: each peer is as large as ours and learns from the same pictures; the rows say so."""

from __future__ import annotations

import pytest
import torch

from vlm.errors import UsageError
from vlm.train import bench
from vlm.train.batches import on_device
from vlm.train.bench import JOINT, VISION, Training, bench_gradcache, bench_idefics, bench_open_clip, bench_train
from vlm.train.bench_peers import IdeficsPeer, OpenClipPeer

TINY = {"vision": VISION | {"image_size": 32, "patch_size": 16, "width": 64, "depth": 2, "heads": 1}}
PAIRS = TINY | {
    "text": {"family": "gpt2", "width": 32, "depth": 2, "heads": 2, "options": {"vocab_size": 49408}},
    "embedding_dim": 32,
}
WRITTEN = TINY | {"text": JOINT["text"] | {"width": 48, "depth": 2, "heads": 2}, "adapter": {"every": 2}}


def parameters(module) -> int:
    return sum(value.numel() for value in module.parameters() if value.requires_grad)


def test_open_clip_is_as_large_as_ours(tmp_path):
    texts = bench.captions(2, 18, 22)
    ours = Training(PAIRS, {"objective": "contrastive"}, texts, tmp_path)
    pixels = on_device(ours.batches[0], ours.engine.device)["pixel_values"]
    peer = OpenClipPeer(ours.engine.module.model, pixels, texts)
    assert parameters(ours.engine.module) == pytest.approx(parameters(peer.model), rel=0.05)
    assert peer.texts.shape == (2, 77)
    own = ours.batches[0]["attention_mask"].sum(1)
    assert torch.allclose(own, (peer.texts != 0).sum(1), rtol=0, atol=2)
    before = float(peer.loss())
    peer.step()
    assert float(peer.loss()) < before


def test_idefics_is_as_large_as_ours_and_reads_the_same(tmp_path):
    ours = Training(WRITTEN, {"objective": "joint", "pack": False}, bench.captions(2, 56, 56), tmp_path)
    peer = IdeficsPeer(ours.engine.module.model, on_device(ours.batches[0], ours.engine.device))
    assert ours.batches[0]["input_ids"].shape == (2, 64)
    shared = parameters(ours.engine.module) / parameters(peer.model)
    assert shared == pytest.approx(1.0, rel=0.05)
    before = float(peer.loss())
    peer.step()
    assert float(peer.loss()) < before


@pytest.mark.parametrize(("measure", "model"), [(bench_open_clip, PAIRS), (bench_idefics, WRITTEN)])
def test_rows_beside_peers(measure, model):
    (row,) = measure(1, model, 2)
    assert row.ours > 0 and row.peer is not None and row.peer > 0 and "batch 2" in row.conditions


def test_memory_of_a_cut_batch(tmp_path):
    """Of real runs; that they hold much beside a few tiny pictures is the price of importing torch."""
    (row,) = bench_gradcache(PAIRS, batch=8, uncut=4, pieces=(2,))
    assert row.less_is_better and 100 < row.ours < 10_000 and row.peer is not None and 100 < row.peer < 10_000
    assert row.conditions == "contrastive batch 8 in micro-batches of 2, fp32; peer: batch 4"


def test_another_peer_is_refused_by_name():
    with pytest.raises(
        UsageError, match="there is no llava to measure against; use one of open_clip, idefics, padded, gradcache, long"
    ):
        bench_train("llava")
