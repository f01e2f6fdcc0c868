"""How tokens are drawn, as a user says it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_sip.errors import ConfigurationError

_LOWEST_TEMPERATURE = 1e-4
"""Logits divided by less leave float32's range."""


@dataclass(frozen=True)
class SamplingParameters:
    """How to draw from a softmax. Temperature acts first, then top_k, then top_p; ties at an edge all stay in."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def validate(self) -> None:
        """Raises ConfigurationError for a value that cannot work."""
        if not (self.temperature == 0.0 or _LOWEST_TEMPERATURE <= self.temperature < float("inf")):
            raise ConfigurationError(
                f"--rollout-temperature is {self.temperature}: give 0 (greedy), or {_LOWEST_TEMPERATURE} or more."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigurationError(f"--rollout-top-p is {self.top_p}: give a share above 0 and up to 1.")
        if self.top_k < 0:
            raise ConfigurationError(f"--rollout-top-k is {self.top_k}: give 0 (all tokens) or more.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def as_greedy(self) -> SamplingParameters:
        return replace(self, temperature=0.0)
