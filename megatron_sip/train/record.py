"""What a run leaves behind for people: console lines, metrics, samples and alarms, all from one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_sip.observability.alarms import AlarmBell
from megatron_sip.observability.config import ObservabilityConfig
from megatron_sip.observability.console import Console
from megatron_sip.observability.metrics import MetricsLog
from megatron_sip.observability.samples import SampleLog
from megatron_sip.train.step import StepOutcome
from megatron_sip.types import IntArray, Preference


class RunRecord:
    """Logs of a run, from ``open`` to ``close``. Ranks that log nothing are built with ``enabled`` False."""

    def __init__(
        self, config: ObservabilityConfig, decode: Callable[[IntArray], str], train_iters: int, enabled: bool
    ) -> None:
        self._config = config
        self._decode = decode
        self._bell = AlarmBell(config)
        self._console = Console(train_iters, config.log_interval) if enabled else None
        self._run_dir = config.run_dir if enabled else None
        self._tensorboard_dir = config.tensorboard_dir if enabled else None
        self._metrics: MetricsLog | None = None
        self._samples: SampleLog | None = None

    def open(self, first_step: int) -> None:
        """Opens the logs of a run that goes on after ``first_step``; what an earlier run wrote beyond it is dropped."""
        self._metrics = MetricsLog(self._run_dir, self._tensorboard_dir, first_step)
        self._samples = SampleLog(self._run_dir, self._decode, first_step)

    def step(
        self, step: int, phase: str, outcome: StepOutcome, scalars: Mapping[str, float], consumed: int, elapsed_s: float
    ) -> None:
        """Records a finished step, numbered from 1; ``scalars`` are all of its scalars."""
        assert self._metrics is not None, "open() before"
        alarms = self._bell.check(step, outcome.health)
        labels: dict[str, Any] = {"phase": phase}
        if alarms:
            labels["alarms"] = [alarm.message for alarm in alarms]
        self._metrics.log(step, scalars, consumed, labels)
        if outcome.preferences and step % self._config.log_samples_interval == 0:
            self._record_preferences(step, outcome.preferences)
        if self._console is not None:
            for alarm in alarms:
                self._console.message(f"WARNING: {alarm.message} ({alarm.name})")
            self._console.update(step, scalars, consumed, elapsed_s, outcome.result.skipped, phase)

    def validation(self, step: int, loss: float) -> None:
        """Prints a validation loss; it is logged with the step's scalars."""
        if self._console is not None:
            self._console.validation(step, loss)

    def message(self, text: str) -> None:
        """Prints a line on the one rank that has a console."""
        if self._console is not None:
            self._console.message(text)

    def state_dict(self) -> dict[str, int]:
        """When each alarm rang last."""
        return self._bell.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from a checkpoint."""
        self._bell.load_state_dict(state)

    def close(self) -> None:
        """Flushes and closes the logs."""
        for log in (self._metrics, self._samples):
            if log is not None:
                log.close()

    def _record_preferences(self, step: int, preferences: Sequence[Preference]) -> None:
        assert self._samples is not None
        self._samples.log(step, preferences[: self._config.log_samples])
