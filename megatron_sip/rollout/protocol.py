"""What a rollout engine is asked for, and what every engine, in process or on a server, must offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.types import Candidate, IntArray


@dataclass(frozen=True)
class SeedKey:
    """The run's seed and the training step: with sample and rollout number the address of every random number."""

    seed: int
    step: int


@dataclass(frozen=True)
class GenerationRequest:
    """Asks for ``num_rollouts`` continuations of one prefix."""

    sample_id: int
    prefix: IntArray
    """Token ids [1..]."""
    num_rollouts: int
    max_new_tokens: int
    seed_key: SeedKey
    greedy: bool = False
    """Takes the most likely token each time, whatever ``sampling`` says; K greedy rollouts are K copies."""
    sampling: SamplingParameters | None = None
    """None: as the engine was configured."""


class RolloutEngine(Protocol):
    """Samples continuations from the policy."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Candidate]]:
        """The rollouts of each request, in order. Called on all ranks of the job, on those of a replica with equal
        requests, perhaps with none, and returns equal candidates on all of them."""
        ...

    def sync_weights(self, version: int) -> None:
        """The one door through which weights reach the engine. ``version``: optimizer steps behind them."""
        ...
