"""The console line of a run: Megatron-LM's, whose fields people's scripts parse, and after them ours."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TextIO

from megatron_sip.observability.progress import RemainingTime, format_duration

_AFTER_LOSS = {"loss-scale": "loss scale", "grad-norm": "grad norm", "params-norm": "params norm"}
_SIP_FIELDS = {
    "sip/chosen_rate/suffix": "suffix chosen",
    "sip/chosen_rate/rewrite": "rewrite chosen",
    "sip/chosen_rate/rollout": "rollout chosen",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "sip/pairs_skipped": "pairs skipped",
    "reward/mean": "reward",
    "grpo/skipped_no_spread": "groups without spread",
    "rollout/length": "rollout length",
    "judge/exposed_wait_s": "judge wait (s)",
    "tokens_per_s": "tokens/s",
}


class Console:
    """Gathers the scalars of each step and every ``interval`` steps prints a line with their means over the steps that
    had them. Times, learning rate and batch size are of the last step."""

    def __init__(self, total_steps: int, interval: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._interval = interval
        self._stream = stream or sys.stdout
        self._remaining = RemainingTime(total_steps)
        self._sums: dict[str, tuple[float, int]] = {}
        self._steps = 0
        self._elapsed_s = 0.0
        self._skipped = 0

    def update(
        self,
        step: int,
        scalars: Mapping[str, float],
        samples_consumed: int,
        elapsed_s: float,
        skipped: bool = False,
        phase: str = "",
    ) -> None:
        """Take in one step, which took ``elapsed_s`` seconds; prints if the step is a multiple of the interval or the
        last. ``scalars`` are those of the metrics log."""
        for name, value in scalars.items():
            if math.isfinite(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
        self._steps += 1
        self._elapsed_s += elapsed_s
        self._skipped += skipped
        seconds_left = self._remaining.update(step, time.monotonic())
        if step % self._interval == 0 or step == self._total_steps:
            self.message(self._line(step, scalars, samples_consumed, seconds_left, phase))
            self._sums.clear()
            self._steps = self._skipped = 0
            self._elapsed_s = 0.0

    def message(self, text: str) -> None:
        """Print any other line, with the time in front."""
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        self._stream.write(f" [{now}] {text}\n")
        self._stream.flush()

    def validation(self, step: int, loss: float) -> None:
        """Print the validation loss as Megatron-LM does, with its perplexity."""
        perplexity = math.exp(min(20.0, loss))
        self.message(
            f"validation loss at iteration {step} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |"
        )

    def _line(
        self, step: int, latest: Mapping[str, float], samples_consumed: int, seconds_left: float | None, phase: str
    ) -> str:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        fields = [
            f"iteration {step:8d}/{self._total_steps:8d}",
            f"consumed samples: {samples_consumed:12d}",
            f"elapsed time per iteration (ms): {1000.0 * self._elapsed_s / self._steps:.1f}",
        ]
        if "throughput" in means:
            throughput = means["throughput"]
            # A CPU's would read 0.0 in Megatron's one decimal.
            digits = f"{throughput:.1f}" if throughput >= 1 else f"{throughput:.2g}"
            fields.append(f"throughput per GPU (TFLOP/s/GPU): {digits}")
        if "learning-rate" in latest:
            fields.append(f"learning rate: {latest['learning-rate']:.6E}")
        if "batch-size" in latest:
            fields.append(f"global batch size: {int(latest['batch-size']):5d}")
        losses = [name for name in means if name.endswith(" loss")]
        fields += [f"{name}: {means[name]:.6E}" for name in losses]
        fields += [f"{label}: {means[name]:.3f}" for name, label in _AFTER_LOSS.items() if name in means]
        fields.append(f"number of skipped iterations: {self._skipped:3d}")
        if phase:
            fields.append(f"phase: {phase}")
        fields += [f"{label}: {_short(means[name])}" for name, label in _SIP_FIELDS.items() if name in means]
        if seconds_left is not None:
            fields.append(f"ETA: {format_duration(seconds_left)}")
        return " | ".join(fields) + " |"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"
