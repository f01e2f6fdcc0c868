"""Posts requests to several endpoints; retries what may succeed later, and counts everything.

``HttpClient`` knows nothing of what is asked; ``ChatClient`` asks for chat completions, one client per teacher process,
in its event loop. ``complete`` never raises for what a server or the network does: it returns a ``Failure``.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import aiohttp
import orjson

from megatron_sip.teacher.http.endpoints import Endpoint, EndpointPool, Lease, Outcome
from megatron_sip.teacher.http.failures import SERVER, TRANSPORT, Failure, failure_of_status
from megatron_sip.teacher.http.limits import LatencyWindow, RateLimiter, backoff_s
from megatron_sip.teacher.http.reply import Reply, decode_json, read_reply

T = TypeVar("T")
_MOST_BYTES = 64 << 20
"""Of an answer: a hundred votes of some thousand tokens each take a few MiB."""


@dataclass(frozen=True)
class ClientSettings:
    """Of one client, after the run-wide limits were split over the replicas."""

    max_in_flight: int
    connect_timeout_s: float
    read_timeout_s: float
    """Longest silence of a server that has accepted a request."""
    request_timeout_s: float
    """One attempt, all included."""
    give_up_s: float
    """One request with all its attempts and pauses, from when it got a place in flight."""
    max_attempts: int
    backoff_s: float
    max_backoff_s: float
    breaker_failures: int
    breaker_pause_s: float
    rate_per_s: float
    """0: unlimited."""
    hedge_percentile: float
    """A request slower than this percentile is sent once more, to another endpoint; 0: never."""
    seed: int = 0
    """Of jitter, and the endpoint to begin with: the number of the replica."""


@dataclass(frozen=True)
class _Attempt(Generic[T]):
    outcome: T | Failure
    endpoint: Endpoint | None
    free: bool = False
    """A failed probe of an endpoint known to be bad does not use up one of the request's attempts."""


class HttpClient(Generic[T]):
    """Asks one route of several servers of the same model.

    Args:
        urls: of the servers.
        settings: limits.
        path: of the route, after the URL.
        read: the body of a 200 -> its meaning, or why it is none.
        api_key: sent and never shown: messages that echo it are masked.
    """

    def __init__(
        self,
        urls: Sequence[str],
        settings: ClientSettings,
        path: str,
        read: Callable[[bytes], T | Failure],
        api_key: str = "",
    ) -> None:
        self._settings = settings
        self._path = path
        self._read = read
        self._api_key = api_key
        self._random = random.Random(settings.seed)
        self._pool = EndpointPool(
            urls, settings.breaker_failures, settings.breaker_pause_s, self._random, first=settings.seed
        )
        self._slots = asyncio.Semaphore(settings.max_in_flight)
        self._rate = RateLimiter(settings.rate_per_s)
        self._latencies = LatencyWindow(settings.hedge_percentile)
        self._session: aiohttp.ClientSession | None = None
        self._last_harm = ""
        self.counts: Counter[str] = Counter()
        """``requests``, ``attempts``, ``retries``, ``hedges``, ``answered``, ``failed``, and per failed attempt
        ``attempt_`` + its kind."""

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        return self._pool.endpoints

    def leave_out(self, urls: Collection[str]) -> None:
        """See ``EndpointPool.leave_out``; to be called while no request is under way."""
        self._pool.leave_out(urls)

    async def complete(self, body: Callable[[], Mapping[str, Any]]) -> T | Failure:
        """Answer to one request. Waits while ``max_in_flight`` others are under way.

        ``body`` is made when its turn has come: of a hundred thousand questions only those under way take memory.
        """
        async with self._slots:
            self.counts["requests"] += 1
            outcome = await self._until_answered(_encoded(body()))
        self.counts["failed" if isinstance(outcome, Failure) else "answered"] += 1
        return outcome

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _until_answered(self, payload: bytes) -> T | Failure:
        settings, used, avoid = self._settings, 0, None
        deadline = time.monotonic() + settings.give_up_s
        while True:
            # Time spent waiting for our own rate limit is nobody's fault.
            deadline += await self._rate.wait()
            attempt = await self._attempt_hedged(payload, deadline, avoid)
            outcome = attempt.outcome
            if not isinstance(outcome, Failure) or not outcome.transient or attempt.endpoint is None:
                return outcome
            used += not attempt.free
            if used >= settings.max_attempts:
                return outcome
            pause = backoff_s(max(1, used), settings.backoff_s, settings.max_backoff_s, self._random)
            if time.monotonic() + pause >= deadline:
                return outcome
            await asyncio.sleep(pause)
            self.counts["retries"] += 1
            avoid = attempt.endpoint

    async def _attempt_hedged(self, payload: bytes, deadline: float, avoid: Endpoint | None) -> _Attempt[T]:
        lease = await self._pool.acquire(deadline, avoid)
        if lease is None:
            why = f"; the last failure is {self._last_harm}" if self._last_harm else ""
            return _Attempt(
                Failure(TRANSPORT, f"no endpoint could be asked within {self._settings.give_up_s:g} s{why}"), None
            )
        threshold = self._latencies.value()
        if threshold is None:
            return await self._attempt(payload, lease, deadline)
        first = asyncio.create_task(self._attempt(payload, lease, deadline))
        tasks = {first}
        try:
            await asyncio.wait(tasks, timeout=threshold)
            # A hedge takes a free place; it does not make others wait.
            if not first.done() and not self._slots.locked():
                await self._rate.wait()
                second = None if first.done() else self._pool.try_acquire(avoid=lease.endpoint)
                if second is not None:
                    self.counts["hedges"] += 1
                    tasks.add(asyncio.create_task(self._attempt(payload, second, deadline)))
            return await _first_answer(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _attempt(self, payload: bytes, lease: Lease, deadline: float) -> _Attempt[T]:
        outcome: T | Failure | None = None
        try:
            outcome = await self._send(payload, lease.endpoint, deadline)
        finally:
            failure = outcome if isinstance(outcome, Failure) else None
            seen = Outcome.UNKNOWN if outcome is None else Outcome.GOOD
            if failure is not None and failure.harms_endpoint:
                seen, self._last_harm = Outcome.BAD, str(failure)
            self._pool.release(lease, seen, failure.retry_after_s if failure else None)
        if isinstance(outcome, Failure):
            self.counts[f"attempt_{outcome.kind}"] += 1
        return _Attempt(outcome, lease.endpoint, free=lease.probe)

    async def _send(self, payload: bytes, endpoint: Endpoint, deadline: float) -> T | Failure:
        settings = self._settings
        start = time.monotonic()
        total = max(0.001, min(settings.request_timeout_s, deadline - start))
        self.counts["attempts"] += 1
        try:
            async with self._open_session().post(
                f"{endpoint.url}{self._path}",
                data=payload,
                timeout=aiohttp.ClientTimeout(
                    total=total, sock_connect=settings.connect_timeout_s, sock_read=settings.read_timeout_s
                ),
                allow_redirects=False,
            ) as response:
                body = await _bounded(response)
        except TimeoutError:
            message = f"no answer from {endpoint.url} after {time.monotonic() - start:.1f} s"
            # A time-out that our own deadline cut short says nothing of the endpoint.
            return Failure(TRANSPORT, message, transient=True, harms_endpoint=total >= settings.request_timeout_s)
        except (aiohttp.ClientError, OSError) as error:
            message = self._masked(f"{type(error).__name__} at {endpoint.url}: {error}")
            return Failure(TRANSPORT, message[:300], transient=True, harms_endpoint=True)
        if response.status == 200:
            outcome = self._read(body)
            if not isinstance(outcome, Failure):
                self._latencies.add(time.monotonic() - start)
            return outcome
        if response.status < 300:
            return Failure(SERVER, f"HTTP {response.status} in place of 200", transient=True, harms_endpoint=True)
        now = datetime.datetime.now(datetime.UTC)
        failure = failure_of_status(response.status, decode_json(body), response.headers, now)
        return failure if not self._api_key else _with_message(failure, self._masked(failure.message))

    def _masked(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text

    def _open_session(self) -> aiohttp.ClientSession:
        """Made on first use: a session belongs to the running event loop."""
        if self._session is None:
            headers = {"Content-Type": "application/json"}
            if self._api_key:
                headers["Authorization"] = f"Bearer {self._api_key}"
            # The number of connections is bounded by max_in_flight; idle ones are kept for the next request.
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=30.0)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers)
        return self._session


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises ClientPayloadError for one that no completion can be, before it fills the memory."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise aiohttp.ClientPayloadError(f"the answer is longer than {_MOST_BYTES >> 20} MiB")
    return b"".join(parts)


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        # Lone surrogates, which broken corpora hold: the standard library escapes them.
        return json.dumps(body).encode()


class ChatClient(HttpClient[Reply]):
    """Asks for chat completions."""

    def __init__(self, urls: Sequence[str], settings: ClientSettings, api_key: str = "") -> None:
        super().__init__(urls, settings, "/chat/completions", read_reply, api_key)


async def _first_answer(tasks: set[asyncio.Task[_Attempt[T]]]) -> _Attempt[T]:
    """The first reply; a failure only if all have failed."""
    pending, last = set(tasks), None
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            last = task.result()
            if not isinstance(last.outcome, Failure):
                return last
    assert last is not None
    return last


def _with_message(failure: Failure, message: str) -> Failure:
    return Failure(failure.kind, message, failure.transient, failure.retry_after_s, failure.harms_endpoint)
