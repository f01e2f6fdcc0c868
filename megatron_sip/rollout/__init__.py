"""Candidates for a prefix, and the policy's own continuations among them."""

from megatron_sip.rollout.candidates import CandidatePool, build_group
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.rollout.in_process import InProcessEngine
from megatron_sip.rollout.protocol import GenerationRequest, RolloutEngine, SeedKey
from megatron_sip.rollout.sampling import SamplingParameters, VocabParallelSampler
from megatron_sip.rollout.statistics import rollout_scalars, rollout_sums

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
