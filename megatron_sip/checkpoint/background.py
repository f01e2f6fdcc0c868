"""A process that writes a rank's part of a checkpoint while training goes on, and the watch over it."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_sip.checkpoint.room import num_bytes, why_unwritten
from megatron_sip.checkpoint.writing import WritePlan, WriteResults, write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a rank's write ended; ``error`` is empty if it went well."""

    results: WriteResults
    error: str = ""


class BackgroundWriter:
    """States: running -> ended. It ends with results, with the writer's error, by its death, or by the time-out.

    The process is forked, so it writes the parent's memory as it was at that moment: training may go on at once.
    """

    def __init__(self, planned: WritePlan, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._deadline = clock() + timeout_s
        self._timeout_s = timeout_s
        self._clock = clock
        forks = multiprocessing.get_context("fork")
        self._receiver, sender = forks.Pipe(duplex=False)
        self._process = forks.Process(target=_write_and_report, args=(planned, self._receiver, sender), daemon=True)
        self._outcome: Outcome | None = None
        self._process.start()
        sender.close()

    @property
    def pid(self) -> int:
        """Process id of the writer."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self, wait_s: float = 0.0) -> Outcome | None:
        """The outcome, or None while the writer is at work. Waits up to ``wait_s`` for it."""
        if self._outcome is None:
            self._outcome = self._check(wait_s)
        return self._outcome

    def wait(self) -> Outcome:
        """Waits for the outcome, at the longest until the time-out."""
        while (outcome := self.poll(wait_s=0.2)) is None:
            pass
        return outcome

    def close(self) -> None:
        """Ends the writer, whatever it does."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._receiver.close()

    def _check(self, wait_s: float) -> Outcome | None:
        if self._receiver.poll(wait_s):
            try:
                outcome = self._receiver.recv()
            except EOFError:
                self._process.join()
                return Outcome([], f"the checkpoint writer died (exit code {self._process.exitcode})")
            self._process.join()
            return outcome
        if self._clock() > self._deadline:
            self.close()
            return Outcome(
                [],
                f"the checkpoint writer did not finish within {self._timeout_s / 60:g} minutes: look at the file "
                "system, or raise --async-save-timeout-minutes",
            )
        return None


def write_outcome(planned: WritePlan) -> Outcome:
    """Writes this rank's part here and now."""
    try:
        return Outcome(write(planned), planned.error)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        directory = Path(planned.writer.checkpoint_dir)
        reason = why_unwritten(error, directory, num_bytes(planned.buckets), _written_bytes(planned))
        return Outcome([], planned.error or f"{directory}: {reason}")


def _written_bytes(planned: WritePlan) -> int:
    paths = [Path(path) for path, _, _ in planned.buckets]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _write_and_report(planned: WritePlan, receiver: Connection, sender: Connection) -> None:
    # The parent's handlers and threads do not exist here: without this a SIGTERM would only set a flag, and the first
    # parallel region would wait for threads that were not forked.
    receiver.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    outcome: Any = write_outcome(planned)
    sender.send(outcome)
    sender.close()
