"""Objectives: pure functions of per-token log-probabilities that return sums, one equation each."""

from megatron_sip.objectives.config import GRPOConfig, ObjectiveConfig, ReferenceOptions, build_judged_objective
from megatron_sip.objectives.dpo import OnlineDPO
from megatron_sip.objectives.grpo import GRPO
from megatron_sip.objectives.next_token import NextToken
from megatron_sip.objectives.nll import SuffixNLL

__all__ = [
    "GRPO",
    "GRPOConfig",
    "NextToken",
    "ObjectiveConfig",
    "OnlineDPO",
    "ReferenceOptions",
    "SuffixNLL",
    "build_judged_objective",
]
