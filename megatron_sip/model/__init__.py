"""The policy: presets, Megatron-Core's GPTModel built of our parts, attention plans, log-probabilities."""

from megatron_sip.model.attention import CausalPlan, SharedPrefixPlan
from megatron_sip.model.build import build_model, transformer_config
from megatron_sip.model.config import ModelConfig
from megatron_sip.model.logprobs import vocab_parallel_log_probs
from megatron_sip.model.outputs import ModelOutput, NextLogits, ScoreTargets
from megatron_sip.model.policy import PolicyModel, without_sequence_parallel
from megatron_sip.model.presets import (
    PRESETS,
    Architecture,
    RopeScaling,
    count_parameters,
    padded_vocab_size,
    training_flops_per_token,
)

__all__ = [
    "PRESETS",
    "Architecture",
    "CausalPlan",
    "ModelConfig",
    "ModelOutput",
    "NextLogits",
    "PolicyModel",
    "RopeScaling",
    "ScoreTargets",
    "SharedPrefixPlan",
    "build_model",
    "count_parameters",
    "padded_vocab_size",
    "training_flops_per_token",
    "transformer_config",
    "vocab_parallel_log_probs",
    "without_sequence_parallel",
]
