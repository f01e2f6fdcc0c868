"""Weights from memory to memory by vLLM's weight-transfer interface: a group per server, in which the leader sends.

A group of its own for each server, so that one that is lost takes no other with it, and one that is restarted joins
anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import aiohttp
import torch

from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import RolloutError
from megatron_sip.rollout.vllm.control import (
    FRESH,
    UPDATING,
    Unreachable,
    begin_update,
    end_update,
    get,
    post_once,
    version_of,
)
from megatron_sip.rollout.vllm.links import Group, Link, Sending
from megatron_sip.rollout.vllm.packing import CHUNK_BYTES, Entry, packed
from megatron_sip.rollout.vllm.servers import VllmServers
from megatron_sip.rollout.vllm.stream import ModelStream
from megatron_sip.rollout.vllm.transfer import WAIT_S, has_version, none_took_it, summary, told

_LAST_WORDS_S = 5.0
"""For a server to say why it left the group."""


class DirectTransfer:
    """A WeightTransfer over ``link``."""

    def __init__(
        self,
        stream: ModelStream,
        link: Link,
        servers: VllmServers | None,
        context: ParallelContext,
        timeout_s: float,
    ) -> None:
        """``servers``: on the leader; ``timeout_s``: of a hand-over, waiting for servers included."""
        self._stream = stream
        self._context = context
        self._timeout_s = timeout_s
        self._sender = None if servers is None else Sender(servers, link)

    @property
    def left_behind(self) -> list[str]:
        return [] if self._sender is None else self._sender.left_behind

    def hand_over(self, version: str) -> str:
        entries = self._stream.entries()
        deadline = time.monotonic() + self._timeout_s
        while True:
            own = None if self._sender is None else self._sender.begin(version, entries, deadline)
            sends, problem = self._context.broadcast_object(own)
            if not sends:
                return problem
            again, problem = self._context.broadcast_object(self._move())
            if not again:
                return problem

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _move(self) -> tuple[bool, str] | None:
        """On the leader what ``Sender.end`` returned."""
        if self._sender is None:
            self._stream.pass_on()
            return None
        # Exhausted in any case: other ranks are in the same gathers.
        device = self._sender.device
        for chunk in packed((tensor.to(device) for tensor in self._stream.tensors()), CHUNK_BYTES):
            self._sender.send(chunk)
        return self._sender.end()


class Sender:
    """The leader's part: one update at a time, begun, sent chunk by chunk, ended."""

    def __init__(self, servers: VllmServers, link: Link) -> None:
        self._servers = servers
        self._link = link
        self.device = link.device
        self._groups: dict[str, Group] = {}
        self._version, self._deadline = "", 0.0
        self._updates: dict[str, Future[Any]] = {}
        """``/update_weights`` of each server that receives."""
        self._under_way: dict[str, Sending] = {}
        self._problems: dict[str, str] = {}

    @property
    def left_behind(self) -> list[str]:
        """URLs of the servers that did not take the last version."""
        return [url for url, problem in self._problems.items() if problem]

    def begin(self, version: str, entries: Sequence[Entry], deadline: float) -> tuple[bool, str]:
        """(whether a server is ready to receive, what went wrong with all of them or "")."""
        self._version, self._deadline = version, deadline
        while True:
            try:
                act = told(self._prepare, deadline - time.monotonic(), self.left_behind)
                states = self._servers.on_each(act)
            except RolloutError as error:
                return False, str(error)
            ready = [url for url, state in states.items() if state == _READY]
            self._problems = {url: "" if state == _READY else state for url, state in states.items()}
            if ready or not none_took_it(self._problems, deadline):
                break
            time.sleep(WAIT_S)
        info = update_info(entries)
        for url in ready:
            self._updates[url] = self._servers.begin(_receive(info), url)
        return bool(ready), summary(self._problems, version) if not ready else ""

    def send(self, chunk: torch.Tensor) -> None:
        """Starts to send; returns while it is under way, so that the next chunk is packed meanwhile."""
        self._settle()
        for url in list(self._updates):
            try:
                self._under_way[url] = self._groups[url].send(chunk)
            except RuntimeError as error:
                self._lose(url, str(error))

    def end(self) -> tuple[bool, str]:
        """(whether to begin again, what went wrong or "")."""
        self._settle()
        for url in list(self._updates):
            try:
                self._updates[url].result(max(0.1, self._deadline - time.monotonic()))
            except (Unreachable, RolloutError, TimeoutError) as error:
                self._lose(url, str(error) or "no answer to /update_weights")
        received, self._updates = list(self._updates), {}
        try:
            finished = self._servers.on_each(told(self._finish, self._deadline - time.monotonic()), received)
        except RolloutError as error:
            return False, str(error)
        self._problems |= finished
        if none_took_it(self._problems, self._deadline):
            return True, ""
        return False, summary(self._problems, self._version)

    def close(self) -> None:
        """Leaves the groups."""
        for group in self._groups.values():
            group.abort()
        self._groups.clear()

    async def _prepare(self, url: str, session: aiohttp.ClientSession) -> str:
        """``_READY``, or "" if the server has these weights."""
        if await has_version(session, url, self._version, self._link.keeps_old_weights):
            return ""
        found = await version_of(session, url)
        if url in self._groups and found == FRESH:  # it was restarted
            self._groups.pop(url).abort()
        if found.startswith(UPDATING):
            await self._end_open_update(url, session)
        if url not in self._groups:
            self._groups[url] = await self._join(url, session)
        await begin_update(session, url, self._version)
        await post_once(session, url, "/start_weight_update")
        return _READY

    async def _end_open_update(self, url: str, session: aiohttp.ClientSession) -> None:
        """Of a trainer that was lost after it had begun one; a server that has none open says 500."""
        with contextlib.suppress(Unreachable):
            await post_once(session, url, "/finish_weight_update")

    async def _join(self, url: str, session: aiohttp.ClientSession) -> Group:
        workers = int((await get(session, url, "/get_world_size"))["world_size"])
        try:
            invitation = self._link.invite(url, 1 + workers)
            opening = asyncio.get_running_loop().run_in_executor(None, invitation.open)
            told_server = post_once(session, url, "/init_weight_transfer_engine", init_info=invitation.init_info)
            _, group = await asyncio.gather(told_server, opening)
        except (RuntimeError, OSError) as error:
            raise Unreachable(f"rollout server {url} could not be joined: {_line(error)}") from error
        return group

    async def _finish(self, url: str, session: aiohttp.ClientSession) -> str:
        await post_once(session, url, "/finish_weight_update", weight_version=self._version)
        await end_update(session, url)
        return ""

    def _settle(self) -> None:
        """Waits until the last chunk has left, or its server is given up."""
        for url, sending in self._under_way.items():
            problem = self._wait_for(url, sending)
            if problem:
                self._lose(url, problem)
        self._under_way = {}

    def _wait_for(self, url: str, sending: Sending) -> str:
        pause = 1e-4
        while True:
            try:
                if sending.done():
                    return ""
            except RuntimeError as error:
                return _line(error)
            if self._updates[url].done():  # it answers after the last chunk, or if it failed
                failure = self._updates[url].exception()
                if failure is not None:
                    return _line(failure)
            if time.monotonic() > self._deadline:
                return "the time for the transfer was over"
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def _lose(self, url: str, problem: str) -> None:
        """Goes on without a server: what it was sent is not whole."""
        update = self._updates.pop(url)
        try:
            update.result(_LAST_WORDS_S)
        except (Unreachable, RolloutError) as error:
            problem = str(error)
        except TimeoutError:
            update.cancel()
        self._groups.pop(url).abort()
        self._problems[url] = problem if url in problem else f"rollout server {url} was lost in a transfer: {problem}"


_READY = "ready"


def update_info(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """What ``/update_weights`` is told of the stream."""
    return {
        "names": [name for name, _, _ in entries],
        "dtype_names": [str(dtype).removeprefix("torch.") for _, dtype, _ in entries],
        "shapes": [list(shape) for _, _, shape in entries],
    }


def _receive(info: dict[str, list[Any]]) -> Any:
    async def receive(url: str, session: aiohttp.ClientSession) -> None:
        await post_once(session, url, "/update_weights", update_info=info)

    return receive


def _line(error: BaseException) -> str:
    """The first line: Gloo adds where in its source it was."""
    return str(error).partition("\n")[0].strip()[:300] or type(error).__name__
