"""Step -> what to train on. Everything here is a pure function; what probes have found is an explicit value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sip.curriculum.config import STREAMS, CurriculumConfig, Phase
from megatron_sip.errors import ConfigurationError


@dataclass(frozen=True)
class TriggerState:
    """Which waiting phases probes have opened: part of a run's checkpoint."""

    opened: Mapping[str, int] = field(default_factory=dict)
    """Phase name -> the step at which it begins."""

    def state_dict(self) -> dict[str, Any]:
        return {"opened": dict(self.opened)}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> TriggerState:
        return TriggerState({str(name): int(step) for name, step in state["opened"].items()})


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step trains on."""

    phase: str
    phase_index: int
    counts: Mapping[str, int]
    """Stream -> samples of the global batch, over all data-parallel replicas; every stream is there."""
    weights: Mapping[str, float]
    """Stream -> factor of its mean loss."""
    probe: bool
    """True: judge a batch of rollouts without training on it and pass the outcome to ``Curriculum.observe``."""


class Curriculum:
    """The phases of a run, for one batch size.

    ``micro_batch_sizes`` maps each stream to the rows of its micro-batches; a stream that is not named has ``default``
    rows, the entry of that name, or else 1.

    How shares become counts: the batch is cut into blocks of as many samples as the least common multiple of
    ``dp_size * micro-batch size`` over the streams of the mixture, so that each stream fills whole micro-batches on
    every replica. Each stream gets the blocks of its share rounded down; those left go one each to the largest
    remainders, in the order ntp, suffix, rewrite, rollout where they are equal.
    """

    def __init__(
        self,
        config: CurriculumConfig,
        global_batch_size: int,
        dp_size: int = 1,
        micro_batch_sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Raises ConfigurationError if a phase's mixture does not fit the batch."""
        sizes = dict(micro_batch_sizes or {})
        self.phases = config.parsed()
        self.global_batch_size = global_batch_size
        self._units = {s: dp_size * sizes.get(s, sizes.get("default", 1)) for s in STREAMS}
        for index, phase in enumerate(self.phases):
            before = self.phases[index - 1].shares if phase.ramp else {}
            self._block({s: phase.shares[s] + before.get(s, 0.0) for s in STREAMS}, phase.name)
            self._check_no_stream_vanishes(phase)

    @property
    def total_steps(self) -> int | None:
        """Steps of all phases with the longest waits; None if a phase may go on for ever."""
        total = 0
        for phase in self.phases:
            wait = phase.wait_for.max_steps if phase.wait_for else 0
            if phase.steps is None or wait is None:
                return None
            total += phase.steps + wait
        return total

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that some phase trains on."""
        return tuple(s for s in STREAMS if any(phase.shares[s] > 0 for phase in self.phases))

    def plan(self, step: int, trigger: TriggerState) -> StepPlan:
        """``step``: optimizer steps already made, from 0."""
        starts = self._starts(trigger)
        index = max(i for i, start in enumerate(starts) if start is not None and start <= step)
        phase, start = self.phases[index], starts[index]
        assert start is not None
        shares = self._ramped(index, step - start)
        return StepPlan(
            phase=phase.name,
            phase_index=index,
            counts=self._counts(shares, phase.name),
            weights=dict(phase.weights),
            probe=self._is_probe(index, step, trigger, start),
        )

    def observe(
        self, step: int, rollout_win_rate: float, trigger: TriggerState, next_step: int | None = None
    ) -> TriggerState:
        """The state after the probe of ``step``; a phase that it opens begins at ``next_step``, else ``step + 1``.

        ``rollout_win_rate``: share of judged groups won by a rollout; NaN (nothing could be judged) changes nothing.
        ``next_step``: the first step that has no plan yet, where steps are prepared ahead.
        """
        plan = self.plan(step, trigger)
        if not plan.probe or math.isnan(rollout_win_rate):
            return trigger
        waiting = self.phases[plan.phase_index + 1]
        assert waiting.wait_for is not None
        if rollout_win_rate < waiting.wait_for.rollout_win_rate:
            return trigger
        return TriggerState({**trigger.opened, waiting.name: step + 1 if next_step is None else next_step})

    def _starts(self, trigger: TriggerState) -> list[int | None]:
        """First step of each phase; None for one that still waits, and for those after it."""
        starts: list[int | None] = [0]
        for before, phase in zip(self.phases, self.phases[1:], strict=False):
            start = starts[-1]
            if start is None or before.steps is None:
                starts.append(None)
                continue
            earliest = start + before.steps
            if phase.wait_for is None:
                starts.append(earliest)
                continue
            limit = phase.wait_for.max_steps
            latest = None if limit is None else earliest + limit
            opened = trigger.opened.get(phase.name)
            known = [s for s in (opened, latest) if s is not None]
            starts.append(min(known) if known else None)
        return starts

    def _is_probe(self, index: int, step: int, trigger: TriggerState, start: int) -> bool:
        """Probes come on the last step of the phase before, and then every ``probe_every`` steps."""
        phase = self.phases[index]
        if index + 1 == len(self.phases) or phase.steps is None:
            return False
        waiting = self.phases[index + 1]
        if waiting.wait_for is None or waiting.name in trigger.opened:
            return False
        waited = step - (start + phase.steps - 1)
        limit = waiting.wait_for.max_steps
        return waited >= 0 and waited % waiting.wait_for.probe_every == 0 and (limit is None or waited < limit)

    def _ramped(self, index: int, step_in_phase: int) -> Mapping[str, float]:
        phase = self.phases[index]
        if step_in_phase >= phase.ramp:
            return phase.shares
        before = self.phases[index - 1].shares
        part = (step_in_phase + 1) / (phase.ramp + 1)
        return {s: (1 - part) * before[s] + part * phase.shares[s] for s in STREAMS}

    def _block(self, shares: Mapping[str, float], name: str) -> int:
        units = {s: self._units[s] for s in STREAMS if shares[s] > 0}
        block = math.lcm(*units.values())
        if self.global_batch_size % block:
            raise ConfigurationError(
                f"curriculum phase {name!r}: the global batch size {self.global_batch_size} is not a multiple of "
                f"{block}, which data-parallel size x micro-batch size of its streams ({units}) asks for: change the "
                "global batch size or the micro-batch sizes"
            )
        return block

    def _counts(self, shares: Mapping[str, float], name: str) -> dict[str, int]:
        block = self._block(shares, name)
        num_blocks = self.global_batch_size // block
        # Rounding guards against 0.1 + 0.2: a share of exactly k blocks must not come out as k - 1 and a remainder.
        exact = {s: round(shares[s] * num_blocks, 9) for s in STREAMS}
        blocks = {s: math.floor(exact[s]) for s in STREAMS}
        by_remainder = sorted(STREAMS, key=lambda s: blocks[s] - exact[s])  # stable: ties keep the order of STREAMS
        for stream in by_remainder[: num_blocks - sum(blocks.values())]:
            blocks[stream] += 1
        return {s: blocks[s] * block for s in STREAMS}

    def _check_no_stream_vanishes(self, phase: Phase) -> None:
        counts = self._counts(phase.shares, phase.name)
        for stream, share in phase.shares.items():
            if share > 0 and counts[stream] == 0:
                raise ConfigurationError(
                    f"curriculum phase {phase.name!r}: the share {share:g} of {stream} is less than one block of "
                    f"{self._block(phase.shares, phase.name)} samples in a global batch of {self.global_batch_size}: "
                    "raise the share or the global batch size, or lower the micro-batch size"
                )
