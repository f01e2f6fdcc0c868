"""What the log says of the judge: counts and latencies since it was last asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_sip.teacher.interfaces import JudgeResult


@dataclass
class JudgeStatistics:
    """Of one replica. Latencies are per call."""

    num_calls: int = 0
    num_failures: int = 0
    num_cached: int = 0
    num_comparisons: int = 0
    num_groups: int = 0
    num_both_orders: int = 0
    num_flips: int = 0
    latencies_s: list[np.ndarray] = field(default_factory=list)

    def add(self, result: JudgeResult) -> None:
        self.num_groups += len(result.groups)
        self.num_calls += sum(group.num_calls for group in result.groups)
        self.num_failures += sum(group.num_failures for group in result.groups)
        self.num_comparisons += sum(group.num_comparisons for group in result.groups)
        self.num_cached += result.num_cached
        self.num_both_orders += result.num_both_orders
        self.num_flips += result.num_flips
        self.latencies_s.append(result.latencies_s)

    def take(self) -> dict[str, float]:
        """The scalars, from an empty start again. A rate of nothing is left out rather than reported as 0."""
        scalars: dict[str, float] = {"judge/calls": self.num_calls, "judge/cached": self.num_cached}
        if self.num_calls:
            scalars["judge/parse_fail_rate"] = self.num_failures / self.num_calls
        if self.num_both_orders:
            scalars["judge/position_flip_rate"] = self.num_flips / self.num_both_orders
        if self.num_groups:
            scalars["judge/comparisons_per_prompt"] = self.num_comparisons / self.num_groups
        latencies = np.concatenate(self.latencies_s) if self.latencies_s else np.zeros(0)
        if latencies.size:
            scalars["judge/latency_p50_s"] = float(np.percentile(latencies, 50))
            scalars["judge/latency_p99_s"] = float(np.percentile(latencies, 99))
        self.__init__()  # type: ignore[misc]
        return scalars
