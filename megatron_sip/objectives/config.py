"""Options of the objectives and of the reference policy that they compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.types import Objective

if TYPE_CHECKING:
    from megatron_sip.objectives.grpo import GRPO

OBJECTIVES = ("rf_nll", "online_dpo")
LOSS_MEANS = ("token", "sequence", "constant")
REFERENCE_POLICIES = ("frozen", "synced", "ema", "none")


@dataclass(frozen=True)
class ReferenceOptions:
    """The reference policy: a former state of the weights that are trained."""

    reference_policy: str = option(
        "frozen",
        choices=REFERENCE_POLICIES,
        help="reference of DPO and of a KL term: the weights at the start (frozen), a copy every "
        "--reference-sync-interval steps (synced), a moving average (ema), or none",
    )
    reference_sync_interval: int = option(25, help="optimizer steps between two copies of a synced reference")
    reference_ema_decay: float = option(0.99, help="decay per step of an ema reference")
    reference_placement: str = option(
        "device",
        choices=("device", "host"),
        help="where the reference's weights wait: on the device (faster), or in pinned host memory, swapped in to use",
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the objective reads reference log-probs."""
        return self.reference_policy != "none"

    def validate_reference(self) -> None:
        """Raise ConfigurationError on values that cannot work."""
        if self.reference_sync_interval < 1:
            raise ConfigurationError(
                f"--reference-sync-interval is {self.reference_sync_interval}; give at least 1 step"
            )
        if not 0 <= self.reference_ema_decay < 1:
            raise ConfigurationError(
                f"--reference-ema-decay is {self.reference_ema_decay}; it must lie in [0, 1). For weights that never "
                "change use --reference-policy frozen"
            )


@dataclass(frozen=True)
class ObjectiveConfig(ReferenceOptions):
    """What the judged stream learns by. The other streams (next-token, suffix, rewrite) are always NLL."""

    objective: str = option(
        "online_dpo",
        choices=OBJECTIVES,
        help="loss of the judged candidates: online_dpo (best against worst) or rf_nll (NLL on the best)",
    )
    dpo_beta: float = option(
        0.1,
        help="how strongly DPO holds the policy to the reference (ours: the paper gives none)",
        also_called=("beta",),
    )
    dpo_label_smoothing: float = option(0.0, help="share of preferences taken to be wrong, in [0, 0.5)")
    dpo_nll_weight: float = option(0.0, help="weight of an added NLL on the chosen candidate, per token of it")

    @property
    def needs_reference(self) -> bool:
        """Whether the judged objective reads reference log-probs."""
        return self.objective == "online_dpo" and self.reference_policy != "none"

    def validate(self) -> None:
        """Raise ConfigurationError on values that cannot work."""
        if self.dpo_beta <= 0:
            raise ConfigurationError(f"--dpo-beta is {self.dpo_beta}; give a number above 0, such as 0.1")
        if not 0 <= self.dpo_label_smoothing < 0.5:
            raise ConfigurationError(
                f"--dpo-label-smoothing is {self.dpo_label_smoothing}; it must lie in [0, 0.5), else preferences invert"
            )
        if self.dpo_nll_weight < 0:
            raise ConfigurationError(f"--dpo-nll-weight is {self.dpo_nll_weight}; give 0 (off) or more")
        self.validate_reference()


def build_judged_objective(config: ObjectiveConfig) -> Objective:
    """The objective of the judged stream."""
    # Here, so that options can be read without torch.
    from megatron_sip.objectives.dpo import OnlineDPO
    from megatron_sip.objectives.nll import SuffixNLL

    if config.objective == "rf_nll":
        return SuffixNLL(name="rf_nll")
    return OnlineDPO(
        beta=config.dpo_beta,
        label_smoothing=config.dpo_label_smoothing,
        nll_weight=config.dpo_nll_weight,
        needs_reference=config.needs_reference,
    )


@dataclass(frozen=True)
class GRPOConfig(ReferenceOptions):
    """How the judge and the rewriter learn from the rewards of their rollouts."""

    advantage_std: bool = option(
        True, help="divide a group's rewards by their standard deviation (GRPO); off: only centre them (Dr.GRPO)"
    )
    loss_mean: str = option(
        "sequence",
        choices=LOSS_MEANS,
        help="mean of the loss: over all tokens, over the means of the rollouts (GRPO), or over their sums divided by "
        "the most new tokens (constant: Dr.GRPO)",
    )
    clip_low: float = option(0.2, help="the probability ratio of bad rollouts is clipped below 1 minus this")
    clip_high: float = option(0.2, help="the probability ratio of good rollouts is clipped above 1 plus this")
    kl_weight: float = option(0.0, help="weight of the KL divergence to the reference, per token; 0 needs none")

    @property
    def needs_reference(self) -> bool:
        """Whether the objective reads reference log-probs."""
        return self.kl_weight > 0

    def validate(self) -> None:
        """Raise ConfigurationError on values that cannot work."""
        if not 0 < self.clip_low < 1:
            raise ConfigurationError(f"--clip-low is {self.clip_low}; give a number between 0 and 1, such as 0.2")
        if self.clip_high <= 0:
            raise ConfigurationError(f"--clip-high is {self.clip_high}; give a number above 0, such as 0.2")
        if self.kl_weight < 0:
            raise ConfigurationError(f"--kl-weight is {self.kl_weight}; give 0 (off) or more")
        if self.kl_weight and self.reference_policy == "none":
            raise ConfigurationError(
                f"--kl-weight is {self.kl_weight}, but --reference-policy none leaves nothing to compare with: use "
                "frozen, or --kl-weight 0"
            )
        self.validate_reference()

    def build(self) -> GRPO:
        """The objective."""
        from megatron_sip.objectives.grpo import GRPO

        return GRPO(self.loss_mean, self.clip_low, self.clip_high, self.kl_weight)
