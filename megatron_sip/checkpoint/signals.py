"""Decides, on all ranks together, when a run saves and ends before its last step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sip.distributed import ParallelContext

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_ECHO_S = 5.0
"""Ctrl-C reaches a rank twice: from the terminal, and from torchrun, which passes it on."""


@dataclass(frozen=True)
class StopDecision:
    """Why the run ends, and the exit status that says so to whoever started it."""

    reason: str
    exit_code: int
    """128 + the signal's number, as shells count; 0 where the run ends by its own plan."""


class StopSignals:
    """Notes SIGTERM and SIGINT in place of dying of them, within a ``with`` block.

    The step at hand can then be finished and saved. A SIGINT later than ``_ECHO_S`` after the first signal is
    not held back: it raises KeyboardInterrupt.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.received: signal.Signals | None = None
        self._received_s = 0.0
        self._clock = clock
        self._launcher: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_orphaned(self) -> bool:
        """Whether torchrun, which would pass signals on and end this rank with the others, has ended itself."""
        return self._launcher is not None and os.getppid() != self._launcher

    def __enter__(self) -> StopSignals:
        # Only under torchrun: a rank that somebody else started may well outlive the shell that it was started from.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_s = signal.Signals(number), self._clock()
        elif number == signal.SIGINT and self._clock() - self._received_s > _ECHO_S:
            raise KeyboardInterrupt


class StopWatch:
    """Says after each step whether the run is to save and end: a signal, the launcher's death, or its time is up."""

    def __init__(
        self,
        signals: StopSignals,
        exit_duration_in_mins: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock`` returns seconds; the duration counts from now."""
        self._signals = signals
        self._limit_s = None if exit_duration_in_mins is None else 60 * exit_duration_in_mins
        self._clock = clock
        self._start_s = clock()

    def decide(self, context: ParallelContext) -> StopDecision | None:
        """The same decision on all ranks, though one has the signal or its clock runs ahead. Collective."""
        received = self._signals.received
        elapsed_s = self._clock() - self._start_s
        over = self._limit_s is not None and elapsed_s >= self._limit_s
        orphaned = self._signals.is_orphaned
        if not context.any_rank(received is not None or over or orphaned):
            return None
        for number in _SIGNALS:
            if context.any_rank(received == number):
                return StopDecision(f"received {number.name}", 128 + number)
        if context.any_rank(orphaned):
            return StopDecision("torchrun has ended without this rank", 1)
        assert self._limit_s is not None
        return StopDecision(f"--exit-duration-in-mins {self._limit_s / 60:g} is over", 0)
