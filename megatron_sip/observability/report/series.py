"""Reads what a run recorded and turns it into series over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sip.observability.jsonl import read_steps
from megatron_sip.observability.metrics import METRICS_FILE
from megatron_sip.observability.run_info import read_run_info
from megatron_sip.observability.samples import SAMPLES_FILE

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One scalar over steps; only the steps that have a finite value."""

    name: str
    steps: Values
    values: Values

    @property
    def last(self) -> float:
        """The last value."""
        return float(self.values[-1])


@dataclass(frozen=True)
class Phase:
    """Steps ``first`` to ``last`` that the curriculum spent in one phase."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows."""

    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    info: Mapping[str, Any]

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """Read a run's folder; what is not there is empty."""
        metrics = sorted(read_steps(run_dir / METRICS_FILE), key=lambda record: int(record["step"]))
        return cls(metrics, list(read_steps(run_dir / SAMPLES_FILE)), read_run_info(run_dir))

    @property
    def last_step(self) -> int:
        """The last step that was logged, 0 if none."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def series(self) -> dict[str, Series]:
        """All scalars by name, those with at least one finite value."""
        points: dict[str, list[tuple[float, float]]] = {}
        for record in self.metrics:
            for name, value in record.items():
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if number and name != "step" and math.isfinite(value):
                    points.setdefault(name, []).append((float(record["step"]), float(value)))
        return {
            name: Series(name, np.array([step for step, _ in pairs]), np.array([value for _, value in pairs]))
            for name, pairs in points.items()
        }

    def phases(self) -> list[Phase]:
        """Runs of steps with the same ``phase`` label, in order."""
        phases: list[Phase] = []
        for record in self.metrics:
            name, step = record.get("phase"), int(record["step"])
            if not isinstance(name, str):
                continue
            if phases and phases[-1].name == name:
                phases[-1] = Phase(name, phases[-1].first, step)
            else:
                phases.append(Phase(name, step, step))
        return phases

    def alarms(self) -> list[tuple[int, str]]:
        """(step, message) of every alarm that was passed on."""
        return [(int(record["step"]), str(text)) for record in self.metrics for text in record.get("alarms") or ()]


def smooth(values: Values, window: int) -> Values:
    """Centred moving mean; at the ends over what there is of the window."""
    if window <= 1 or len(values) < 3:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    means: Values = (sums[high] - sums[low]) / (high - low)
    return means


def running_median(values: Values, window: int) -> Values:
    """Centred moving median, which a single slow step does not move; at the ends over what there is of the window."""
    half = window // 2
    index = range(len(values))
    return np.array([np.median(values[max(0, at - half) : at + half + 1]) for at in index], dtype=np.float64)


def filled(series: Sequence[Series]) -> list[Series]:
    """The same series over the steps of them all; one that has no value at a step has 0 there."""
    steps = np.unique(np.concatenate([one.steps for one in series]))
    whole = []
    for one in series:
        values = np.zeros(len(steps))
        values[np.searchsorted(steps, one.steps)] = one.values
        whole.append(Series(one.name, steps, values))
    return whole


def without_steps(series: Series, steps: Values) -> Series:
    """What is left of a series without its values at ``steps``."""
    kept = ~np.isin(series.steps, steps)
    return Series(series.name, series.steps[kept], series.values[kept])


def thin(steps: Values, values: Values, max_points: int) -> tuple[Values, Values]:
    """At most ``max_points`` points: the means of equally many neighbours each."""
    if len(steps) <= max_points:
        return steps, values
    edges = np.linspace(0, len(steps), max_points + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(steps, edges[:-1]) / counts, np.add.reduceat(values, edges[:-1]) / counts


def mean_of_tenth(series: Series, last: bool) -> float:
    """Mean over the first or the last tenth of the points, at least one."""
    count = max(1, len(series.values) // 10)
    return float(np.mean(series.values[-count:] if last else series.values[:count]))
