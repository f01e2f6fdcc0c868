"""The policy: presets, Megatron-Core's GPTModel built of our parts, attention plans, log-probabilities."""

from typing import TYPE_CHECKING

from megatron_sip.lazy import imported_when_asked_for
from megatron_sip.model.config import ModelConfig
from megatron_sip.model.presets import (
    PRESETS,
    Architecture,
    RopeScaling,
    count_parameters,
    padded_vocab_size,
    training_flops_per_token,
)

if TYPE_CHECKING:
    from megatron_sip.model.attention import CausalPlan, SharedPrefixPlan
    from megatron_sip.model.build import build_model, transformer_config
    from megatron_sip.model.logprobs import vocab_parallel_log_probs
    from megatron_sip.model.outputs import ModelOutput, NextLogits, ScoreTargets
    from megatron_sip.model.policy import PolicyModel, without_sequence_parallel
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        attention="CausalPlan SharedPrefixPlan",
        build="build_model transformer_config",
        logprobs="vocab_parallel_log_probs",
        outputs="ModelOutput NextLogits ScoreTargets",
        policy="PolicyModel without_sequence_parallel",
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
