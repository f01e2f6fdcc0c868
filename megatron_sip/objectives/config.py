"""Options of the judged stream's objective and of the reference policy it compares with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.objectives.dpo import OnlineDPO
from megatron_sip.objectives.nll import SuffixNLL
from megatron_sip.types import Objective

OBJECTIVES = ("rf_nll", "online_dpo")
REFERENCE_POLICIES = ("frozen", "synced", "ema", "none")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the judged stream learns by. The other streams (next-token, suffix, rewrite) are always NLL."""

    objective: str = option(
        "online_dpo",
        choices=OBJECTIVES,
        help="loss of the judged candidates: online_dpo (best against worst) or rf_nll (NLL on the best)",
    )
    dpo_beta: float = option(
        0.1, help="how strongly DPO holds the policy to the reference (ours: the paper gives none)"
    )
    dpo_label_smoothing: float = option(0.0, help="share of preferences taken to be wrong, in [0, 0.5)")
    dpo_nll_weight: float = option(0.0, help="weight of an added NLL on the chosen candidate, per token of it")
    reference_policy: str = option(
        "frozen",
        choices=REFERENCE_POLICIES,
        help="reference of DPO: the weights at the start (frozen), a copy every --reference-sync-interval steps "
        "(synced), a moving average (ema), or none",
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
        if self.reference_sync_interval < 1:
            raise ConfigurationError(
                f"--reference-sync-interval is {self.reference_sync_interval}; give at least 1 step"
            )
        if not 0 <= self.reference_ema_decay < 1:
            raise ConfigurationError(
                f"--reference-ema-decay is {self.reference_ema_decay}; it must lie in [0, 1). For weights that never "
                "change use --reference-policy frozen"
            )


def build_judged_objective(config: ObjectiveConfig) -> Objective:
    """The objective of the judged stream."""
    if config.objective == "rf_nll":
        return SuffixNLL(name="rf_nll")
    return OnlineDPO(
        beta=config.dpo_beta,
        label_smoothing=config.dpo_label_smoothing,
        nll_weight=config.dpo_nll_weight,
        needs_reference=config.needs_reference,
    )
