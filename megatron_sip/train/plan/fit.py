"""Finds the paces (shares of the peaks, launch times) that explain measured times best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sip.train.plan.costs import Work
from megatron_sip.train.plan.hardware import DeviceConfig
from megatron_sip.train.plan.speed import Pace, seconds_by_cause

_LOWEST_SHARE, _MOST_US = 1e-3, 1e5
_FIRST_STEP, _LAST_STEP = math.log(4.0), math.log(1.002)


@dataclass(frozen=True)
class Sample:
    """A measured pass."""

    name: str
    work: Work
    seconds: float


def predicted(sample: Sample, device: DeviceConfig, pace: Pace) -> float:
    """Seconds of its work at a pace."""
    return sum(seconds_by_cause(sample.work, device, pace).values())


def error(samples: Sequence[Sample], device: DeviceConfig, pace: Pace) -> float:
    """Sum of the squared logarithms of planned over measured time."""
    return sum(math.log(predicted(sample, device, pace) / sample.seconds) ** 2 for sample in samples)


def fit_pace(samples: Sequence[Sample], device: DeviceConfig) -> Pace:
    """The pace of least ``error``: from several starts, one coordinate at a time in ever smaller factors.

    Roofs make the error not differentiable, and it has few and positive parameters: a search by factors is enough.
    """

    def of(logs: Sequence[float]) -> float:
        return error(samples, device, _pace(logs))

    starts = [(share, share / 2, memory, us) for share in (0.7, 0.2) for memory in (0.5, 0.05) for us in (30.0, 1000.0)]
    best = min((_descend(of, [math.log(value) for value in start]) for start in starts), key=lambda found: found[1])
    return _pace(best[0])


def _descend(of: Callable[[Sequence[float]], float], logs: list[float]) -> tuple[list[float], float]:
    step, best = _FIRST_STEP, of(logs)
    while step > _LAST_STEP:
        improved = False
        for index in range(len(logs)):
            for change in (step, -step):
                moved = [*logs]
                moved[index] += change
                value = of(moved)
                if value < best - 1e-12:
                    logs, best, improved = moved, value, True
        if not improved:
            step /= 2
    return logs, best


def _pace(logs: Sequence[float]) -> Pace:
    matmul, attention, memory = (min(1.0, max(_LOWEST_SHARE, math.exp(log))) for log in logs[:3])
    return Pace(matmul, attention, memory, min(_MOST_US, math.exp(logs[3])))
