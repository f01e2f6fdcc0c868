"""How fast and how often to send: rate limit, back-off, and when to hedge."""

from __future__ import annotations

import asyncio
import random
import time
from bisect import insort
from collections import deque


class RateLimiter:
    """At most ``rate_per_s`` requests a second, evenly spaced, in the order of asking; 0 does not limit."""

    def __init__(self, rate_per_s: float) -> None:
        self._interval_s = 1.0 / rate_per_s if rate_per_s > 0 else 0.0
        self._next = 0.0

    async def wait(self) -> float:
        """Until it is this request's turn; returns the seconds waited."""
        if not self._interval_s:
            return 0.0
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._interval_s
        if start > now:
            await asyncio.sleep(start - now)
        return start - now


def backoff_s(attempt: int, base_s: float, cap_s: float, random_source: random.Random) -> float:
    """Exponential with full jitter: uniform in [0, min(cap, base x 2^(attempt - 1))] after failed attempt 1, 2, ..."""
    return random_source.uniform(0.0, min(cap_s, base_s * 2.0 ** min(attempt - 1, 30)))


class LatencyWindow:
    """A percentile of the last latencies; None until there are enough of them."""

    def __init__(self, percentile: float, size: int = 1000, enough: int = 100) -> None:
        self._share = percentile / 100.0
        self._size = size
        self._enough = enough
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, latency_s: float) -> None:
        self._recent.append(latency_s)
        insort(self._sorted, latency_s)
        if len(self._recent) > self._size:
            self._sorted.remove(self._recent.popleft())

    def value(self) -> float | None:
        if not self._share or len(self._sorted) < self._enough:
            return None
        return self._sorted[min(len(self._sorted) - 1, int(self._share * len(self._sorted)))]
