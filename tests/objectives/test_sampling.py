"""Distance to the sampling policy, on numbers worked out by hand."""

from dataclasses import replace
from math import exp, nan

import pytest
import torch

from megatron_sip.objectives import AgainstSampling, SuffixNLL
from megatron_sip.types import RowBatch, RowLayout

NOW = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0], [-5.0, -5.0, -5.0]])
SAMPLED = torch.tensor([[-1.5, -2.0, -2.0], [nan, nan, 0.0], [-1.0, -1.0, -1.0]])


def batch() -> RowBatch:
    """Three rows of up to 3 tokens: a rollout, a suffix that nobody sampled (its third token is padding), a filler."""
    zeros = torch.zeros(3, 3, dtype=torch.int64)
    return RowBatch(
        layout=RowLayout(1, 1, 3),
        tokens=torch.zeros(3, 4, dtype=torch.int64),
        positions=torch.zeros(3, 4, dtype=torch.int64),
        prefix_lengths=torch.ones(3, dtype=torch.int64),
        targets=zeros,
        sources=zeros,
        mask=torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 1, 1]]),
        weights=torch.tensor([1.0, 1.0, 0.0]),
        sampling_log_probs=SAMPLED,
    )


def test_mean_and_maximum_are_over_sampled_tokens_of_rows_that_teach() -> None:
    terms = AgainstSampling(SuffixNLL())(NOW, batch())
    total, count = terms.metrics["rollout/logprob_diff_mean"]
    assert (float(total), float(count)) == (1.5, 3.0)  # |0.5| + |0| + |-1|
    assert [float(x) for x in terms.metrics["rollout/logprob_diff_max"]] == [1.0, 1.0]
    assert float(terms.loss_sum) == 8.0  # 6 of the rollout, 2 of the suffix: as without


def test_rows_without_a_sampled_token_count_nothing_but_are_named() -> None:
    metrics = AgainstSampling(SuffixNLL())(NOW, replace(batch(), sampling_log_probs=None)).metrics
    assert [float(x) for x in metrics["rollout/logprob_diff_mean"]] == [0.0, 0.0]
    assert [float(x) for x in metrics["rollout/logprob_diff_max"]] == [0.0, 0.0]


@pytest.mark.parametrize(("cap", "weight"), [(2.0, exp(-0.5)), (0.25, 0.25)])
def test_a_rollout_is_weighted_by_its_ratio_up_to_the_cap_and_a_suffix_by_one(cap: float, weight: float) -> None:
    log_probs = NOW.clone().requires_grad_()
    objective = AgainstSampling(SuffixNLL(), cap)
    terms = objective(log_probs, batch())
    assert float(terms.loss_sum) == pytest.approx(6 * weight + 2)
    total, count = terms.metrics["rollout/importance_weight"]
    assert (float(total), float(count)) == (pytest.approx(weight), 1.0)
    terms.loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([-weight] * 3)  # the weight itself is not learned
    assert objective.units(batch()) == 5.0
    assert AgainstSampling(SuffixNLL()).is_linear and not objective.is_linear


def test_padding_and_fillers_may_hold_anything() -> None:
    spoiled = NOW.clone()
    spoiled[1, 2] = spoiled[2, 0] = -torch.inf
    terms = AgainstSampling(SuffixNLL(), cap=2.0)(spoiled, batch())
    assert torch.isfinite(terms.loss_sum) and float(terms.metrics["rollout/logprob_diff_max"][0]) == 1.0
