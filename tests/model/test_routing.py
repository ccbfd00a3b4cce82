"""Router balance: the loss and the busiest expert are the formulas, over the tokens that count."""

from __future__ import annotations

import torch
import transformers as hf

from vlm.routing import balances, router_loss


def test_the_formula_in_float64():
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(2 * 7, 5, generator=generator) for _ in range(3))
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    loss, busiest = router_loss(2, layers, real)
    shares, chances, most = [], [], []
    for logits in layers:
        counted = logits.double()[real.flatten()]
        given = torch.zeros_like(counted).scatter_(1, counted.topk(2, dim=1).indices, 1.0)
        shares.append(given)
        chances.append(counted.softmax(1))
        most.append(given.mean(0).max())
    expected = 5 * (torch.cat(shares).mean(0) * torch.cat(chances).mean(0)).sum()
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    assert torch.allclose(busiest.double(), torch.stack(most).mean(), rtol=1e-6)


def test_which_families_balance():
    assert balances(hf.MixtralConfig(router_aux_loss_coef=0.02))
    assert not balances(hf.MixtralConfig(router_aux_loss_coef=0.0)) and not balances(hf.LlamaConfig())
