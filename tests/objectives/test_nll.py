"""Next-token and suffix NLL against numbers computed by hand and a dense cross-entropy."""

from __future__ import annotations

import math

import torch

from megatron_sip.objectives import NextToken, SuffixNLL
from tests.objectives.rows import batch_of

MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def test_next_token_sums_valid_tokens_of_weighted_rows() -> None:
    log_probs = torch.tensor([[-0.5, -1.5, -9.0], [-2.0, -9.0, -9.0], [-9.0, -9.0, -9.0]], requires_grad=True)
    batch = batch_of(MASK, [1.0, 1.0, 0.0], num_candidates=0)
    terms = NextToken()(log_probs, batch)
    assert terms.loss_sum.item() == 4.0  # 0.5 + 1.5 + 2.0; row 3 has weight 0
    assert NextToken().units(batch) == 3.0
    loss, count = terms.metrics["lm loss"]
    assert (loss.item(), count.item()) == (4.0, 3.0)
    terms.loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_suffix_nll_equals_dense_cross_entropy_with_its_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 3, 7, requires_grad=True)
    targets = torch.randint(7, (3, 3))
    log_probs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    terms = SuffixNLL("rewrite")(log_probs, batch_of(MASK, [1.0, 1.0, 1.0], num_candidates=1))
    (gradient,) = torch.autograd.grad(terms.loss_sum, logits, retain_graph=True)

    labels = torch.where(MASK > 0, targets, -100)
    dense = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (dense_gradient,) = torch.autograd.grad(dense, logits)
    torch.testing.assert_close(terms.loss_sum, dense)
    torch.testing.assert_close(gradient, dense_gradient)
    assert list(terms.metrics) == ["loss/rewrite"]


def test_padding_of_impossible_tokens_leaves_loss_and_gradient_finite() -> None:
    log_probs = torch.tensor([[-0.5, -math.inf, math.nan]], requires_grad=True)
    terms = SuffixNLL()(log_probs, batch_of(torch.tensor([[1.0, 0.0, 0.0]]), [1.0], num_candidates=1))
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 0.5
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_a_batch_of_rows_that_teach_nothing_has_no_units_and_no_loss() -> None:
    batch = batch_of(MASK, [0.0, 0.0, 0.0], num_candidates=1)
    assert SuffixNLL().units(batch) == 0.0
    assert SuffixNLL()(torch.full((3, 3), -2.0), batch).loss_sum.item() == 0.0
