"""GRPO's loss and gradient against the formulas written out in numpy, token by token, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sip.objectives import GRPO
from megatron_sip.preference import group_advantages
from megatron_sip.types import RowBatch, RowLayout

GROUPS, ROLLOUTS, WIDTH = 3, 4, 5
LOW, HIGH, KL = 0.2, 0.28, 0.3
REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.25, 0.5, 0.0, 1.0]])
LENGTHS = np.array([[5, 2, 1, 3], [2, 2, 2, 2], [4, 5, 3, 1]])


def advantages(rewards: np.ndarray) -> np.ndarray:
    """[K]: centred, and divided by the population's deviation."""
    centred = rewards - sum(rewards) / len(rewards)
    return centred / (sum(centred**2) / len(rewards)) ** 0.5


def expected(new: np.ndarray, old: np.ndarray, reference: np.ndarray, mean: str) -> tuple[float, float]:
    """(sum, number of units) of the two groups that have spread."""
    total = units = 0.0
    for group in (0, 2):
        for rollout, advantage in enumerate(advantages(REWARDS[group])):
            losses = []
            for t in range(LENGTHS[group, rollout]):
                ratio = np.exp(new[group, rollout, t] - old[group, rollout, t])
                bounded = min(max(ratio, 1 - LOW), 1 + HIGH)
                gap = reference[group, rollout, t] - new[group, rollout, t]
                losses.append(-min(ratio * advantage, bounded * advantage) + KL * (np.exp(gap) - gap - 1))
            total += {"token": sum(losses), "sequence": sum(losses) / len(losses), "constant": sum(losses) / WIDTH}[
                mean
            ]
            units += len(losses) if mean == "token" else 1
    return total, units


def batch(old: np.ndarray, reference: np.ndarray) -> RowBatch:
    mask = (np.arange(WIDTH) < LENGTHS[..., None]).astype(np.float32)
    flat, size = (GROUPS, ROLLOUTS * WIDTH), 1 + ROLLOUTS * WIDTH
    ours = [group_advantages(rewards) for rewards in REWARDS]
    return RowBatch(
        layout=RowLayout(1, ROLLOUTS, WIDTH),
        tokens=torch.zeros(GROUPS, size, dtype=torch.long),
        positions=torch.zeros(GROUPS, size, dtype=torch.long),
        prefix_lengths=torch.ones(GROUPS, dtype=torch.long),
        targets=torch.zeros(flat, dtype=torch.long),
        sources=torch.zeros(flat, dtype=torch.long),
        mask=torch.tensor(mask.reshape(flat)),
        weights=torch.tensor([one.weight for one in ours]),
        reference_log_probs=torch.tensor(reference.reshape(flat), dtype=torch.float32),
        sampling_log_probs=torch.tensor(old.reshape(flat), dtype=torch.float32),
        advantages=torch.tensor(np.stack([one.values for one in ours]), dtype=torch.float32),
    )


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_loss_units_and_gradient_are_those_of_the_formula(mean: str) -> None:
    chance = np.random.default_rng(3)
    new = -chance.uniform(0.1, 3.0, (GROUPS, ROLLOUTS, WIDTH))
    old, reference = (new + chance.normal(0.0, 0.4, new.shape) for _ in range(2))
    objective, rows = GRPO(mean, LOW, HIGH, KL), batch(old, reference)
    log_probs = torch.tensor(new.reshape(GROUPS, -1), dtype=torch.float32, requires_grad=True)
    terms = objective(log_probs, rows)
    total, units = expected(new, old, reference, mean)
    assert terms.loss_sum.item() == pytest.approx(total, rel=1e-5)
    assert objective.units(rows) == units == {"token": 24.0}.get(mean, 8.0)
    held = terms.metrics["grpo/clipped"][0]
    assert 3 <= float(held) <= 20  # the bounds act on some tokens, not on all
    terms.loss_sum.backward()
    assert log_probs.grad is not None
    step = 1e-5
    for index in np.ndindex(new.shape):
        change = np.zeros_like(new)
        change[index] = step
        higher, lower = (expected(new + sign * change, old, reference, mean)[0] for sign in (1, -1))
        found = log_probs.grad.reshape(new.shape)[index].item()
        assert found == pytest.approx((higher - lower) / (2 * step), rel=1e-4, abs=1e-5), index
