"""Candidates for a prefix, and the policy's own continuations among them."""

from typing import TYPE_CHECKING

from megatron_sip.lazy import imported_when_asked_for
from megatron_sip.rollout.candidates import CandidatePool, build_group
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.rollout.protocol import GenerationRequest, RolloutEngine, SeedKey
from megatron_sip.rollout.statistics import rollout_scalars, rollout_sums

if TYPE_CHECKING:
    from megatron_sip.rollout.in_process import InProcessEngine
    from megatron_sip.rollout.sampling import VocabParallelSampler
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        in_process="InProcessEngine",
        sampling="VocabParallelSampler",
    )

__all__ = [
    "CandidatePool",
    "GenerationRequest",
    "InProcessEngine",
    "RolloutConfig",
    "RolloutEngine",
    "SamplingParameters",
    "SeedKey",
    "VocabParallelSampler",
    "build_group",
    "rollout_scalars",
    "rollout_sums",
]
