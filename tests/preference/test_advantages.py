"""Advantages computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sip.preference import (
    RowShape,
    group_advantages,
    group_rows,
    reward_metrics,
    reward_sums,
    without_missing,
)
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Sample

NAN = float("nan")


def test_rewards_are_centred_and_divided_by_their_standard_deviation() -> None:
    # Mean 1/4, deviation sqrt(3)/4.
    found = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]))
    assert found.values.tolist() == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
    assert (found.weight, found.reason) == (1.0, "")


def test_dr_grpo_only_centres() -> None:
    found = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), normalize=False)
    assert found.values.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_a_missing_reward_is_no_zero() -> None:
    found = group_advantages(np.array([1.0, NAN, 0.5]), normalize=False)
    assert found.values.tolist() == [0.25, 0.0, -0.25]  # with NaN as 0 it would be 0.5, -0.5, 0


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([1.0, 1.0, 1.0], "no_spread"),
        ([0.1 + 0.2, 0.3], "no_spread"),
        ([1.0, NAN], "missing"),
        ([NAN, NAN], "missing"),
    ],
)
def test_a_group_without_spread_teaches_nothing(rewards: list[float], reason: str) -> None:
    found = group_advantages(np.array(rewards))
    assert found.values.tolist() == [0.0] * len(rewards)
    assert (found.weight, found.reason) == (0.0, reason)


def test_skipped_groups_and_missing_rewards_are_counted() -> None:
    rewards = [np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([NAN, 0.0]), np.array([NAN, NAN])]
    scalars = reward_metrics(reward_sums(rewards, [group_advantages(group) for group in rewards]))
    assert scalars == {
        "grpo/skipped_no_spread": 1.0,
        "grpo/skipped_missing": 2.0,
        "grpo/rewards_missing": 3.0,
        "reward/mean": 3 / 5,
        "reward/group_std": 0.5 / 4,
    }


def test_the_rows_of_a_group_hold_its_advantages_and_no_token_of_an_unrewarded_rollout() -> None:
    rollouts = tuple(
        Candidate(CandidateKind.ROLLOUT, np.array(tokens), number, np.full(len(tokens), -1.0, np.float32))
        for number, tokens in enumerate(([5, 6], [7], [8, 9]))
    )
    group = CandidateGroup(Sample(0, 0, np.array([1, 2, 3]), np.array([4])), rollouts)
    rewards = np.array([1.0, NAN, 0.0])
    advantages = group_advantages(rewards)
    (batch,) = group_rows([without_missing(group, rewards)], RowShape(1, 2), [advantages.values], [advantages.weight])
    assert batch.mask.tolist() == [[1, 1, 0, 0, 1, 1]]
    assert batch.targets.tolist() == [[5, 6, 0, 0, 8, 9]]
    assert batch.advantages is not None and batch.advantages.tolist() == [[1.0, 0.0, -1.0]]
    assert batch.sampling_log_probs is not None
    assert batch.sampling_log_probs.tolist() == [[-1, -1, 0, 0, -1, -1]]


def test_groups_are_filled_up_to_a_number_of_micro_batches_with_rows_that_teach_nothing() -> None:
    group = CandidateGroup(
        Sample(0, 0, np.array([1]), np.array([4])), (Candidate(CandidateKind.ROLLOUT, np.array([5]), 0),) * 2
    )
    batches = group_rows([group], RowShape(2, 1), [np.array([1.0, -1.0])], [1.0], num_micro_batches=2)
    assert [batch.weights.tolist() for batch in batches] == [[1.0, 0.0], [0.0, 0.0]]
