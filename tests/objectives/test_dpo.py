"""Online DPO against numbers computed by hand and a dense reference on separate sequences."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sip.objectives import ObjectiveConfig, OnlineDPO, SuffixNLL, build_judged_objective
from tests.objectives.rows import batch_of

# One pair, T = 2: chosen (-1, -2), rejected (-4, padding).
POLICY = [[-1.0, -2.0, -4.0, -50.0]]
REFERENCE = [[-1.5, -2.0, -3.0, -70.0]]
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0]])


def test_dpo_of_one_pair_is_the_number_computed_by_hand() -> None:
    log_probs = torch.tensor(POLICY, requires_grad=True)
    terms = OnlineDPO(beta=0.1)(log_probs, batch_of(MASK, [1.0], 2, torch.tensor(REFERENCE)))
    # Rewards 0.1 * (-3 + 3.5) = 0.05 and 0.1 * (-4 + 3) = -0.1; margin 0.15; log(1 + e^-0.15) = 0.6209573.
    assert terms.loss_sum.item() == pytest.approx(0.6209573, abs=1e-6)
    terms.loss_sum.backward()
    slope = 0.1 / (1 + math.exp(0.15))  # beta * sigmoid(-margin) = 0.0462570
    assert slope == pytest.approx(0.0462570, abs=1e-6)
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([-slope, -slope, slope, 0.0], abs=1e-7)
    values = {name: float(total / count) for name, (total, count) in terms.metrics.items()}
    assert values["rewards/chosen"] == pytest.approx(0.05)
    assert values["rewards/rejected"] == pytest.approx(-0.1)
    assert values["rewards/margins"] == pytest.approx(0.15)
    assert values["rewards/accuracies"] == 1.0
    assert (values["logps/chosen"], values["logps/rejected"]) == (-3.0, -4.0)


def test_without_a_reference_the_margin_is_of_the_policy_alone() -> None:
    objective = OnlineDPO(beta=0.1, needs_reference=False)
    terms = objective(torch.tensor(POLICY), batch_of(MASK, [1.0], 2, reference_log_probs=None))
    assert terms.loss_sum.item() == pytest.approx(math.log(1 + math.exp(-0.1)))  # 0.1 * (-3 + 4)


def test_a_missing_reference_is_refused_and_not_taken_as_zero() -> None:
    with pytest.raises(ValueError, match="reference_log_probs"):
        OnlineDPO()(torch.tensor(POLICY), batch_of(MASK, [1.0], 2, None))


def test_smoothing_mixes_both_orders_and_nll_is_per_token_of_the_chosen() -> None:
    batch = batch_of(MASK, [1.0], 2, torch.tensor(REFERENCE))
    smoothed = OnlineDPO(beta=0.1, label_smoothing=0.2)(torch.tensor(POLICY), batch).loss_sum.item()
    assert smoothed == pytest.approx(0.8 * 0.6209573 + 0.2 * 0.7709573, abs=1e-6)  # log(1 + e^0.15) = 0.7709573
    mixed = OnlineDPO(beta=0.1, nll_weight=0.5)(torch.tensor(POLICY), batch).loss_sum.item()
    assert mixed == pytest.approx(0.6209573 + 0.5 * 1.5, abs=1e-6)  # (1 + 2) / 2 tokens


def test_dpo_and_its_gradient_equal_a_dense_reference_on_separate_sequences() -> None:
    torch.manual_seed(1)
    num_pairs, width, vocabulary, beta = 3, 5, 11, 0.3
    logits = torch.randn(num_pairs, 2 * width, vocabulary, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, (num_pairs, 2 * width))
    lengths = torch.tensor([[5, 3], [2, 5], [1, 4]])
    mask = (torch.arange(width) < lengths.unsqueeze(-1)).float().reshape(num_pairs, 2 * width)
    reference = -torch.rand(num_pairs, 2 * width).double()
    log_probs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    objective = OnlineDPO(beta=beta)
    batch = batch_of(mask, [1.0, 0.0, 1.0], 2, reference)
    terms = objective(log_probs, batch)
    (gradient,) = torch.autograd.grad(terms.loss_sum, logits, retain_graph=True)

    dense = torch.zeros((), dtype=torch.float64)
    for pair in (0, 2):  # pair 1 is a tie
        ratios = []
        for candidate in (0, 1):
            ratio = torch.zeros((), dtype=torch.float64)
            for token in range(int(lengths[pair, candidate])):
                at = candidate * width + token
                scores = logits[pair, at]
                ratio = ratio + scores[targets[pair, at]] - torch.logsumexp(scores, 0) - reference[pair, at]
            ratios.append(ratio)
        dense = dense + torch.log1p(torch.exp(-beta * (ratios[0] - ratios[1])))
    (dense_gradient,) = torch.autograd.grad(dense, logits)
    torch.testing.assert_close(terms.loss_sum, dense)
    torch.testing.assert_close(gradient, dense_gradient)
    assert objective.units(batch) == 2.0


def test_sequences_are_summed_in_float64() -> None:
    # In float32, 2**24 + 1 is 2**24: the log-ratio of -1 would vanish, and with it the sign of the margin.
    policy = torch.tensor([[-(2.0**24), -1.0, -1.0, -1.0]])
    reference = torch.tensor([[-(2.0**24), 0.0, -1.0, -1.0]])
    terms = OnlineDPO(beta=1.0)(policy, batch_of(torch.ones(1, 4), [1.0], 2, reference))
    assert terms.loss_sum.item() == pytest.approx(math.log(1 + math.exp(1.0)))


def test_a_tie_contributes_neither_loss_nor_gradient_even_if_it_holds_nan() -> None:
    rows = torch.tensor([*POLICY, [math.nan] * 4], requires_grad=True)
    batch = batch_of(MASK.repeat(2, 1), [1.0, 0.0], 2, torch.tensor(REFERENCE * 2))
    terms = OnlineDPO(beta=0.1)(rows, batch)
    assert terms.loss_sum.item() == pytest.approx(0.6209573, abs=1e-6)
    assert float(terms.metrics["rewards/margins"][0]) == pytest.approx(0.15)
    assert terms.metrics["rewards/margins"][1].item() == 1


def test_config_builds_the_judged_objective_it_names() -> None:
    assert build_judged_objective(ObjectiveConfig(objective="rf_nll")) == SuffixNLL("rf_nll")
    assert build_judged_objective(ObjectiveConfig(dpo_beta=0.2, dpo_nll_weight=0.1)) == OnlineDPO(0.2, 0.0, 0.1, True)
    assert not build_judged_objective(ObjectiveConfig(reference_policy="none")).needs_reference
