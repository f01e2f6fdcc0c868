"""Options of candidates and rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.rollout.candidates import CandidatePool
from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.rollout.vllm.config import VllmOptions

AUTOMATIC_GATHER_BYTES = 2 << 30
"""Weights of a whole model that ``--rollout-weights auto`` gathers at most."""


@dataclass(frozen=True)
class RolloutConfig(VllmOptions):
    """Which candidates a prefix gets, and how the policy's own are sampled."""

    candidates: str = option(
        "suffix,rollout:4",
        help="Candidates of each judged prefix: any of suffix, rewrite and rollout:K, separated by commas.",
        also_called=("num_rollouts", "num_generations"),
    )
    rollout_temperature: float = option(
        1.0, help="Sampling temperature of rollouts; 0 decodes greedily.", also_called=("temperature",)
    )
    rollout_top_p: float = option(
        1.0,
        help="Sample from the smallest set of tokens with at least this share of the probability; 1 = from all.",
        also_called=("top_p",),
    )
    rollout_top_k: int = option(
        0, help="Sample from this many most likely tokens; 0 = from all.", also_called=("top_k",)
    )
    rollout_max_new_tokens: int | None = option(
        None, help="Longest rollout, in tokens; by default the length of a suffix."
    )
    rollout_batch_size: int = option(
        64, help="Sequences decoded together on one data-parallel replica (all rollouts of a prefix stay together)."
    )
    rollout_stop_at_eod: bool = option(
        True, help="End a rollout with the end-of-document token, which is part of it and is scored."
    )

    rollout_weights: str = option(
        "auto",
        help="Under tensor parallelism: sharded decodes all rows on all ranks together; gathered puts the whole "
        "weights on every rank for the time of the rollouts and gives each rank rows of its own, without a collective "
        "per layer; auto gathers models of up to 2 GiB.",
        choices=("auto", "sharded", "gathered"),
    )

    def validate(self) -> None:
        """Raises ConfigurationError for a value that cannot work."""
        _ = self.pool
        self.sampling.validate()
        self.validate_vllm()
        if self.rollout_max_new_tokens is not None and self.rollout_max_new_tokens < 1:
            raise ConfigurationError(
                f"--rollout-max-new-tokens is {self.rollout_max_new_tokens}: give at least 1, or leave it out to "
                "take the suffix length."
            )
        if self.rollout_batch_size < 1:
            raise ConfigurationError(f"--rollout-batch-size is {self.rollout_batch_size}: give at least 1.")

    @property
    def pool(self) -> CandidatePool:
        """The parsed ``--candidates``. Raises ConfigurationError."""
        return CandidatePool.parse(self.candidates)

    @property
    def sampling(self) -> SamplingParameters:
        return SamplingParameters(self.rollout_temperature, self.rollout_top_p, self.rollout_top_k)


def gathers_weights(choice: str, model_bytes: float, tp_size: int) -> bool:
    """What ``rollout_weights`` comes to: whether each tensor-parallel rank decodes rows of its own with the whole
    weights of ``model_bytes``."""
    wanted = choice == "gathered" or (choice == "auto" and model_bytes <= AUTOMATIC_GATHER_BYTES)
    return wanted and tp_size > 1
