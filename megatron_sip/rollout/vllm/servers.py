"""vLLM servers: questions by token ids, and calls that steer them. Lives on a replica's leader."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import aiohttp
import numpy as np

from megatron_sip.errors import RolloutError
from megatron_sip.rollout.vllm.config import VllmOptions
from megatron_sip.rollout.vllm.control import CONNECT_S, START, Unreachable, look_once
from megatron_sip.rollout.vllm.fitting import GENERATE, Needs, check_server
from megatron_sip.teacher.http.client import ClientSettings, HttpClient
from megatron_sip.teacher.http.endpoints import State
from megatron_sip.teacher.http.failures import SERVER, Failure
from megatron_sip.teacher.http.reply import decode_json
from megatron_sip.types import FloatArray, IntArray

logger = logging.getLogger(__name__)

T = TypeVar("T")
Act = Callable[[str, aiohttp.ClientSession], Awaitable[T]]

_WATCH_S = 1.0


@dataclass(frozen=True)
class Continuation:
    """One of the n that a server gave."""

    tokens: IntArray
    log_probs: FloatArray
    """float32, of the untruncated softmax at T = 1."""
    ended: bool
    """With a stop token, and not at its longest."""
    versions: tuple[str, ...]
    """Weights that sampled it: more than one if they changed meanwhile."""


Answer = tuple[Continuation, ...]


class VllmServers:
    """A synchronous face on several servers, whose event loop runs in a thread of its own."""

    def __init__(self, options: VllmOptions, replica: int) -> None:
        """``replica``: replicas begin with different servers."""
        self.urls = [url.rstrip("/") for url in options.rollout_endpoints]
        self._timeout_s = options.rollout_request_timeout_s
        self._give_up_s = options.rollout_give_up_s
        key = os.environ.get(options.rollout_api_key_env, "")
        settings = ClientSettings(
            max_in_flight=options.rollout_max_in_flight,
            connect_timeout_s=CONNECT_S,
            read_timeout_s=options.rollout_request_timeout_s,
            request_timeout_s=options.rollout_request_timeout_s,
            give_up_s=options.rollout_give_up_s,
            max_attempts=options.rollout_max_attempts,
            backoff_s=0.5,
            max_backoff_s=10.0,
            breaker_failures=5,
            breaker_pause_s=1.0,
            rate_per_s=0.0,
            hedge_percentile=0.0,
            seed=replica,
        )
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: HttpClient[Answer] = HttpClient(self.urls, settings, GENERATE, read_answer, key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-servers", daemon=True)
        self._thread.start()
        self._longest: dict[str, int] = {}
        """Of the servers that were found to fit."""
        self._left_out: frozenset[str] = frozenset()

    @property
    def longest(self) -> int:
        """Tokens of a sequence, on every server that was found to fit; to be asked after ``check``."""
        return min(self._longest.values())

    def ask(self, bodies: Sequence[Mapping[str, Any]]) -> list[Answer | Failure]:
        """An answer to each, in order."""

        async def ask_all() -> list[Answer | Failure]:
            watch = asyncio.create_task(self._say_when_none_is_left())
            try:
                return list(await asyncio.gather(*(self._client.complete(partial(dict, body)) for body in bodies)))
            finally:
                watch.cancel()

        return self._start(ask_all()).result()

    def leave_out(self, urls: Collection[str]) -> None:
        """Asks these no more, until the next call of this: one that was left half updated would never answer."""
        self._left_out = frozenset(urls)
        self._client.leave_out(urls)

    def check(self, needs: Needs) -> None:
        """Finds what would make answers wrong or transfers impossible, on every server that was not looked at yet.

        One that is not there is left to the next call. Raises RolloutError: one does not fit, or none is there.
        """

        async def look(url: str, session: aiohttp.ClientSession) -> int | Unreachable:
            try:
                if url in self._left_out:
                    await look_once(session, url)
                return await check_server(url, session, needs)
            except Unreachable as error:
                return error

        found = self.on_each(look, [url for url in self.urls if url not in self._longest])
        self._longest |= {url: longest for url, longest in found.items() if isinstance(longest, int)}
        if not self._longest:
            raise RolloutError(str(next(iter(found.values()))))

    def on_each(self, act: Act[T], urls: Sequence[str] | None = None) -> dict[str, T]:
        """What ``act`` returned for each server; all are under way together. The first exception is raised."""
        chosen = self.urls if urls is None else list(urls)

        async def act_on_all() -> list[T]:
            return list(await asyncio.gather(*(self._with_session(act, url) for url in chosen)))

        return dict(zip(chosen, self._start(act_on_all()).result(), strict=True))

    def begin(self, act: Act[T], url: str) -> Future[T]:
        """Starts ``act`` on one server and returns at once."""
        return self._start(self._with_session(act, url))

    def close(self) -> None:
        """Ends connections and the thread."""
        self._start(self._client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _say_when_none_is_left(self) -> None:
        while any(e.state is State.CLOSED and e.rest_until < math.inf for e in self._client.endpoints):
            await asyncio.sleep(_WATCH_S)
        logger.warning(
            "no rollout server answers (%s): trying again until one does, for %g s at most (--rollout-give-up-s)",
            ", ".join(self.urls), self._give_up_s,
        )  # fmt: skip

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _with_session(self, act: Act[T], url: str) -> T:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=CONNECT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            return await act(url, session)


def read_answer(body: bytes) -> Answer | Failure:
    """The body of a 200. An aborted generation is no answer: vLLM gives what it has when it is paused or ends."""
    data = decode_json(body)
    choices = data.get("choices") if isinstance(data, Mapping) else None
    if not isinstance(choices, list) or not choices:
        return Failure(SERVER, "the body has no choices", transient=True, harms_endpoint=True)
    try:
        ordered = sorted(choices, key=lambda choice: choice["index"])
        reasons = {choice["finish_reason"] for choice in ordered}
        if not reasons <= {"stop", "length"}:
            return Failure(SERVER, f"finish_reason is {sorted(reasons)}", transient=True)
        return tuple(_continuation(choice) for choice in ordered)
    except (KeyError, TypeError) as error:
        return Failure(SERVER, f"a choice lacks {error}: {START}", transient=False)


def _continuation(choice: Mapping[str, Any]) -> Continuation:
    scored = choice["logprobs"]["content"]
    return Continuation(
        tokens=np.array(choice["token_ids"], dtype=np.int64),
        log_probs=np.array([entry["logprob"] for entry in scored], dtype=np.float32),
        ended=choice["finish_reason"] == "stop",
        versions=tuple(span["version"] for span in choice["weight_versions"]),
    )
