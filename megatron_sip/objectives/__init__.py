"""Objectives: pure functions of per-token log-probabilities that return sums, one equation each."""

from typing import TYPE_CHECKING

from megatron_sip.lazy import imported_when_asked_for
from megatron_sip.objectives.config import GRPOConfig, ObjectiveConfig, ReferenceOptions, build_judged_objective

if TYPE_CHECKING:
    from megatron_sip.objectives.dpo import OnlineDPO
    from megatron_sip.objectives.grpo import GRPO
    from megatron_sip.objectives.next_token import NextToken
    from megatron_sip.objectives.nll import SuffixNLL
    from megatron_sip.objectives.sampling import AgainstSampling
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        dpo="OnlineDPO",
        grpo="GRPO",
        next_token="NextToken",
        nll="SuffixNLL",
        sampling="AgainstSampling",
    )

__all__ = [
    "GRPO",
    "AgainstSampling",
    "GRPOConfig",
    "NextToken",
    "ObjectiveConfig",
    "OnlineDPO",
    "ReferenceOptions",
    "SuffixNLL",
    "build_judged_objective",
]
