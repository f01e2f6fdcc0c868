"""What a step does while its verdicts are late: nothing, or next-token micro-batches (``--on-late-judgment fill``).

The decision is one of all ranks together, round by round; a round is one micro-batch on every replica. How many windows
a step was filled with is in ``metrics.jsonl`` (``fill/windows``), from which ``--replay-fills`` repeats a run exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.errors import ConfigurationError, DataError

WINDOWS = "fill/windows"
"""Scalar of a step: next-token windows that it was filled with, over all replicas."""


@dataclass(frozen=True)
class FillRule:
    """When a step takes another round of next-token windows. ``max_windows`` 0 never fills."""

    round_windows: int
    """Windows of a round, over all replicas."""
    max_windows: int
    recorded: Mapping[int, int] | None = None
    """Step, numbered from 1 -> windows it was filled with in a recorded run; steps that are not there had none."""

    def more(self, step: int, windows: int, ready: Callable[[], bool]) -> bool:
        """Whether to take another round after ``windows``; ``step``: steps done. ``ready``: collective."""
        if self.recorded is not None:
            wanted = self.recorded.get(step + 1, 0)
            if (wanted - windows) % self.round_windows:
                raise ConfigurationError(
                    f"--replay-fills has {wanted} windows at iteration {step + 1}, which rounds of "
                    f"{self.round_windows} (data-parallel size x --micro-batch-size) do not make up: replay with sizes "
                    "that divide those of the recorded run"
                )
            return windows < wanted
        return windows + self.round_windows <= self.max_windows and not ready()


def recorded_fills(metrics: Path) -> dict[int, int]:
    """Step -> windows, of a run's ``metrics.jsonl``.

    Raises:
        DataError: it cannot be read, or is no record of steps.
    """
    try:
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        return {int(record["step"]): int(record[WINDOWS]) for record in records if record.get(WINDOWS)}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"--replay-fills {metrics} cannot be read ({error}): give a run's metrics.jsonl") from error
