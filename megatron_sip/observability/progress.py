"""How far a long job is and when it will end: for tools, and for the training loop's ETA."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

Item = TypeVar("Item")


def format_duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3675`` -> ``1:01:15``, ``90000`` -> ``1d 01:00:00``."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{left:02d}"
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class RemainingTime:
    """Time left, from the pace of the last ``window`` updates: phases of a run differ in pace, so old steps mislead."""

    def __init__(self, total: int, window: int = 20) -> None:
        self._total = total
        self._marks: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def update(self, done: int, now: float) -> float | None:
        """Note that ``done`` of the total are done at ``now`` (seconds); seconds left, None before the second call."""
        self._marks.append((done, now))
        first_done, first_time = self._marks[0]
        if done == first_done:
            return None
        return (self._total - done) * (now - first_time) / (done - first_done)


class Progress:
    """Prints ``label  34% (1200/3500 docs) 123.0 docs/s, 0:19 left``, at most once per ``interval_s``.

    On a terminal the line is rewritten in place; in a log file each is a line of its own.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "items",
        interval_s: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._interval_s = interval_s if interval_s is not None else (0.2 if self._in_place else 5.0)
        self._clock = clock
        self._start = self._last_shown = clock()
        self.done = 0

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more and print if it is time to."""
        self.done += count
        now = self._clock()
        if now - self._last_shown >= self._interval_s:
            self._last_shown = now
            self._show(now)

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, counting each once it is done with; closes at the end."""
        for item in items:
            yield item
            self.advance()
        self.close()

    def close(self) -> None:
        """Print the final line."""
        elapsed = self._clock() - self._start
        rate = self.done / elapsed if elapsed > 0 else 0.0
        self._write(
            f"{self._label}: {self.done} {self._unit} in {format_duration(elapsed)} ({rate:.1f} {self._unit}/s)"
        )
        if self._in_place:
            self._stream.write("\n")
            self._stream.flush()

    def _show(self, now: float) -> None:
        elapsed = now - self._start
        rate = self.done / elapsed if elapsed > 0 else 0.0
        if self._total is None:
            self._write(f"{self._label}: {self.done} {self._unit}, {rate:.1f} {self._unit}/s")
            return
        left = format_duration((self._total - self.done) / rate) if rate > 0 else "?"
        share = 100.0 * self.done / self._total if self._total else 100.0
        count = f"{share:3.0f}% ({self.done}/{self._total} {self._unit})"
        self._write(f"{self._label}: {count} {rate:.1f} {self._unit}/s, {left} left")

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}" if self._in_place else line + "\n")
        self._stream.flush()
