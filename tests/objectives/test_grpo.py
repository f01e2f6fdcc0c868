"""GRPO against numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_sip.errors import ConfigurationError
from megatron_sip.objectives import GRPO, GRPOConfig
from megatron_sip.types import RowBatch
from tests.objectives.rows import batch_of

# One group of two rollouts, T = 2: (a, b) with advantage 1, (c, padding) with advantage -2.
# Ratios: e^0.1 = 1.105171, e^0.5 = 1.648721 (clipped at 1.2), e^-0.4 = 0.670320 (clipped at 0.8).
OLD = torch.tensor([[-1.0, -2.0, -3.0, -90.0]])
NEW = [[-0.9, -1.5, -3.4, -70.0]]
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0]])


def group(weight: float = 1.0, reference: torch.Tensor | None = None) -> RowBatch:
    batch = batch_of(MASK, [weight], 2, reference)
    return replace(batch, sampling_log_probs=OLD, advantages=torch.tensor([[1.0, -2.0]]))


@pytest.mark.parametrize(
    ("mean", "units", "loss", "slopes"),
    [
        # -(1.105171 + 1.2) + 2 * 0.8; the two clipped tokens have no gradient.
        ("token", 3.0, -0.705171, [-1.105171, 0.0, 0.0, 0.0]),
        # -(1.105171 + 1.2) / 2 + 1.6 / 1
        ("sequence", 2.0, 0.447415, [-0.552585, 0.0, 0.0, 0.0]),
        # (-(1.105171 + 1.2) + 1.6) / 2, T being 2 for both
        ("constant", 2.0, -0.352585, [-0.552585, 0.0, 0.0, 0.0]),
    ],
)
def test_loss_and_gradient_are_the_numbers_computed_by_hand(
    mean: str, units: float, loss: float, slopes: list[float]
) -> None:
    log_probs = torch.tensor(NEW, requires_grad=True)
    objective = GRPO(mean)
    terms = objective(log_probs, group())
    assert objective.units(group()) == units
    assert terms.loss_sum.item() == pytest.approx(loss, abs=1e-5)
    terms.loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx(slopes, abs=1e-5)
    values = {name: float(total / count) for name, (total, count) in terms.metrics.items()}
    assert values["grpo/clipped"] == pytest.approx(2 / 3)
    assert values["grpo/ratio"] == pytest.approx((1.105171 + 1.648721 + 0.670320) / 3, abs=1e-5)
    assert values["loss/grpo"] == pytest.approx(loss / units, abs=1e-5)


def test_a_ratio_that_went_the_wrong_way_is_not_clipped() -> None:
    # A good rollout that became less likely, a bad one that became likelier: the clipped term is the larger one.
    log_probs = torch.tensor([[-1.4, -2.0, -2.5, 0.0]], requires_grad=True)
    terms = GRPO("token")(log_probs, group())
    assert terms.loss_sum.item() == pytest.approx(-0.670320 - 1 + 2 * 1.648721, abs=1e-5)
    terms.loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([-0.670320, -1.0, 2 * 1.648721, 0.0], abs=1e-5)


def test_the_upper_bound_may_be_wider_than_the_lower() -> None:
    terms = GRPO("token", clip_low=0.5, clip_high=0.6)(torch.tensor(NEW), group())
    assert terms.loss_sum.item() == pytest.approx(-1.105171 - 1.6 + 2 * 0.670320, abs=1e-5)


def test_the_divergence_from_the_reference_is_added_per_token() -> None:
    reference = torch.tensor([[-0.9, -1.4, -3.4, 5.0]])  # equal but for the second token: d = 0.1
    log_probs = torch.tensor(NEW, requires_grad=True)
    terms = GRPO("token", kl_weight=2.0)(log_probs, group(reference=reference))
    added = 2 * (math.exp(0.1) - 0.1 - 1)
    assert terms.loss_sum.item() == pytest.approx(-0.705171 + added, abs=1e-5)
    total, count = terms.metrics["grpo/kl_reference"]
    assert float(total / count) == pytest.approx(added / 2 / 3, abs=1e-6)
    terms.loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0, 1].item() == pytest.approx(2 * (1 - math.exp(0.1)), abs=1e-5)


def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient() -> None:
    log_probs = torch.tensor(NEW, requires_grad=True)
    terms = GRPO("token")(log_probs, replace(group(), sampling_log_probs=None))
    assert terms.loss_sum.item() == pytest.approx(-1 - 1 + 2)
    terms.loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([-1.0, -1.0, 2.0, 0.0])


def test_a_group_of_weight_zero_and_padding_teach_nothing_whatever_they_hold() -> None:
    log_probs = torch.full((1, 4), -math.inf, requires_grad=True)
    terms = GRPO(kl_weight=1.0)(log_probs, group(weight=0.0, reference=torch.full((1, 4), math.nan)))
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 0.0
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[0.0] * 4]
    assert GRPO().units(group(weight=0.0)) == GRPO("token").units(group(weight=0.0)) == 0.0
    padded = torch.tensor([[-0.9, -1.5, -3.4, -math.inf]])
    assert GRPO("token")(padded, group()).loss_sum.item() == pytest.approx(-0.705171, abs=1e-5)


def test_what_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="advantages"):
        GRPO()(torch.tensor(NEW), replace(group(), advantages=None))
    with pytest.raises(ValueError, match="reference_log_probs"):
        GRPO(kl_weight=0.1)(torch.tensor(NEW), group())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clip_low": 1.0}, "--clip-low is 1.0"),
        ({"clip_high": 0.0}, "--clip-high is 0.0"),
        ({"kl_weight": -1.0}, "--kl-weight is -1.0"),
        ({"kl_weight": 0.1, "reference_policy": "none"}, "--reference-policy none"),
        ({"reference_sync_interval": 0}, "--reference-sync-interval is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        replace(GRPOConfig(), **change).validate()  # type: ignore[arg-type]


def test_a_reference_is_kept_only_for_a_divergence() -> None:
    assert not GRPOConfig().needs_reference
    assert GRPOConfig(kl_weight=0.1).needs_reference and GRPOConfig(kl_weight=0.1).build().needs_reference
