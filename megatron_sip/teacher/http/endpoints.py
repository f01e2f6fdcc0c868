"""Several servers of the same model: which one to ask next, and which to leave alone for a while.

An endpoint is *closed* (in use), *open* (failing, not asked until its pause is over) or *half-open* (one probe is under
way, which decides). The words are those of an electric circuit breaker.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

_MAX_PAUSE_S = 30.0


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Outcome(Enum):
    """What a call says of its endpoint."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "unknown"
    """Cancelled before its answer."""


@dataclass
class Endpoint:
    url: str
    in_flight: int = 0
    state: State = State.CLOSED
    failures_in_a_row: int = 0
    rest_until: float = 0.0
    """Monotonic time before which it is not asked: its pause when open, or a Retry-After."""
    pause_s: float = field(default=0.0, repr=False)
    times_opened: int = 0
    last_picked: int = 0

    def admits(self, now: float) -> bool:
        return self.state is not State.HALF_OPEN and now >= self.rest_until


@dataclass(frozen=True)
class Lease:
    """The right to send one request to an endpoint."""

    endpoint: Endpoint
    probe: bool


class EndpointPool:
    """Least requests in flight first. All methods belong to one event loop."""

    def __init__(
        self, urls: Sequence[str], max_failures: int, pause_s: float, random_source: random.Random, first: int = 0
    ) -> None:
        """``first``: the endpoint to begin with, so that replicas do not all begin with the same."""
        shift = first % len(urls)
        self.endpoints = [Endpoint(url) for url in [*urls[shift:], *urls[:shift]]]
        self._max_failures = max_failures
        self._pause_s = pause_s
        self._random = random_source
        self._picks = 0
        self._changed = asyncio.Event()

    def leave_out(self, urls: Collection[str]) -> None:
        """These are not asked until the next call of this; those it named before are asked again."""
        for endpoint in self.endpoints:
            if endpoint.url in urls:
                endpoint.rest_until = math.inf
            elif endpoint.rest_until == math.inf:
                endpoint.rest_until = 0.0

    async def acquire(self, deadline: float, avoid: Endpoint | None = None) -> Lease | None:
        """An endpoint to ask, another than ``avoid`` if there is a choice; None if none was to be had in time."""
        while True:
            now = time.monotonic()
            if now >= deadline:
                return None
            lease = self.try_acquire(avoid)
            if lease is not None:
                return lease
            # Those half-open are decided by their probe, which sets the event.
            rests = [e.rest_until for e in self.endpoints if e.state is not State.HALF_OPEN]
            changed = self._changed
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, min([deadline, *rests]) - now)):
                    await changed.wait()

    def try_acquire(self, avoid: Endpoint | None = None) -> Lease | None:
        """The same without waiting."""
        now = time.monotonic()
        admitting = [endpoint for endpoint in self.endpoints if endpoint.admits(now)]
        others = [endpoint for endpoint in admitting if endpoint is not avoid]
        if not admitting:
            return None
        endpoint = min(others or admitting, key=lambda e: (e.in_flight, e.last_picked))
        probe = endpoint.state is State.OPEN
        if probe:
            endpoint.state = State.HALF_OPEN
        self._picks += 1
        endpoint.last_picked = self._picks
        endpoint.in_flight += 1
        return Lease(endpoint, probe)

    def release(self, lease: Lease, outcome: Outcome, retry_after_s: float | None = None) -> None:
        """Give a lease back with what came of it."""
        endpoint = lease.endpoint
        endpoint.in_flight -= 1
        if retry_after_s is not None:
            endpoint.rest_until = max(endpoint.rest_until, time.monotonic() + retry_after_s)
        if lease.probe:
            self._decide(endpoint, outcome)
        elif endpoint.state is State.CLOSED:
            if outcome is Outcome.GOOD:
                endpoint.failures_in_a_row = 0
            elif outcome is Outcome.BAD:
                endpoint.failures_in_a_row += 1
                if endpoint.failures_in_a_row >= self._max_failures:
                    self._open(endpoint)
        # What was sent before it opened says nothing new.
        self._changed.set()
        self._changed = asyncio.Event()

    def _decide(self, endpoint: Endpoint, outcome: Outcome) -> None:
        if outcome is Outcome.BAD:
            self._open(endpoint)
        elif outcome is Outcome.GOOD:
            endpoint.state = State.CLOSED
            endpoint.failures_in_a_row = 0
            endpoint.pause_s = 0.0
        else:
            endpoint.state = State.OPEN

    def _open(self, endpoint: Endpoint) -> None:
        endpoint.state = State.OPEN
        endpoint.times_opened += 1
        endpoint.pause_s = min(_MAX_PAUSE_S, endpoint.pause_s * 2 if endpoint.pause_s else self._pause_s)
        # Jitter, so that replicas do not probe a returning server all at once.
        pause = endpoint.pause_s * self._random.uniform(0.75, 1.25)
        endpoint.rest_until = max(endpoint.rest_until, time.monotonic() + pause)
