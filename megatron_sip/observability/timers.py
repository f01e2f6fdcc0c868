"""Wall time of the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Sums the wall time of named parts: ``with timers("rollout"): ...``.

    ``synchronize`` waits for the device (``distributed`` has it); it is called at both ends of a part if given. Without
    it, the time of kernels that run asynchronously is counted where something waits for them.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.add(name, self._now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def pop(self) -> dict[str, float]:
        """The seconds since the last call, as scalars ``timing/<name>_s``."""
        scalars = {f"timing/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return scalars

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()
