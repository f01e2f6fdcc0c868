"""How servers come by new weights: through files that they read, or over groups that their workers join.

Both are called on all ranks of the first replica and spoken for by its leader. A server that was lost in the middle of
a transfer stays paused, and marked by its version; servers that are left behind are told of, and brought up to date by
the next call that finds them back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import aiohttp

from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import RolloutError
from megatron_sip.rollout.vllm.control import (
    UPDATING,
    Unreachable,
    begin_update,
    end_update,
    get,
    half_updated,
    look_once,
    post,
    post_once,
    version_of,
)
from megatron_sip.rollout.vllm.files import WeightFiles
from megatron_sip.rollout.vllm.servers import Act, VllmServers

logger = logging.getLogger(__name__)

WAIT_S = 3.0
"""Between two looks at servers of which none is there."""


class WeightTransfer(Protocol):
    """Puts the policy's present weights into the servers."""

    @property
    def left_behind(self) -> Sequence[str]:
        """URLs of the servers that did not take the last version; on the leader."""
        ...

    def hand_over(self, version: str) -> str:
        """To every server that has not got ``version``. What went wrong, or "", on the leader; collective."""
        ...

    def close(self) -> None:
        """Leaves nothing behind."""
        ...


class FileTransfer:
    """Every stage writes a file; servers load the directory."""

    def __init__(
        self, files: WeightFiles, servers: VllmServers | None, context: ParallelContext, timeout_s: float
    ) -> None:
        """``servers``: on the leader."""
        self._files, self._servers, self._context, self._timeout_s = files, servers, context, timeout_s
        self._version = ""
        self._directory = Path()
        self.left_behind: list[str] = []

    def hand_over(self, version: str) -> str:
        problem = ""
        if version != self._version:
            self._directory, problem = self._files.write(version)
            self._version = version
        if self._servers is None or problem:
            return problem
        return self._let_load(self._servers, version)

    def close(self) -> None:
        if self._context.rank == 0:
            self._files.remove()

    def _let_load(self, servers: VllmServers, version: str) -> str:
        async def load(url: str, session: aiohttp.ClientSession) -> str:
            if await has_version(session, url, version, takes_half_updated=False):
                return ""
            await begin_update(session, url, version)
            # A reload that fails leaves the model half updated: it stays paused then.
            arguments = {"weights_path": str(self._directory)}
            await post_once(session, url, "/collective_rpc", method="reload_weights", kwargs=arguments)
            await post(session, url, "/update_weight_version", new_version=version)
            await end_update(session, url)
            return ""

        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                problems = servers.on_each(told(load, deadline - time.monotonic(), self.left_behind))
            except RolloutError as error:
                return str(error)
            self.left_behind = [url for url, problem in problems.items() if problem]
            if "" in problems.values():
                self._files.keep_only(self._directory)
            if not none_took_it(problems, deadline):
                return summary(problems, version)
            time.sleep(WAIT_S)


def told(act: Act[str], timeout_s: float, lost: Collection[str] = ()) -> Act[str]:
    """``act`` with its time limited, and failures that may pass as what it returns.

    ``lost``: URLs of servers that were not there last time, which cost the others no time if they still are not.
    """

    async def tell(url: str, session: aiohttp.ClientSession) -> str:
        try:
            if url in lost:
                await look_once(session, url)
            return await asyncio.wait_for(act(url, session), max(0.1, timeout_s))
        except Unreachable as error:
            return str(error)
        except TimeoutError:
            return f"rollout server {url} did not come to an end within {max(0.1, timeout_s):.0f} s"

    return tell


async def has_version(session: aiohttp.ClientSession, url: str, version: str, takes_half_updated: bool) -> bool:
    """Whether the server has these weights; it answers then, also if the last call of an update was lost.

    Raises Unreachable: it was left half updated, and cannot take weights any more.
    """
    found = await version_of(session, url)
    if found == version:
        if (await get(session, url, "/is_paused")).get("is_paused"):
            await end_update(session, url)
        return True
    if found.startswith(UPDATING) and not takes_half_updated:
        raise half_updated(url, found)
    return False


def none_took_it(problems: Mapping[str, str], deadline: float) -> bool:
    """Whether to wait for a server: there is none, and time is left."""
    waits = "" not in problems.values() and time.monotonic() + WAIT_S < deadline
    if waits:
        left_s = deadline - time.monotonic()
        problem = next(iter(problems.values()))
        logger.warning(
            "waiting for a rollout server, for %.0f s at most (--rollout-sync-timeout-s): %s", left_s, problem
        )
    return waits


def summary(problems: Mapping[str, str], version: str) -> str:
    """What to end the run for, or ""; warns of servers that are left behind."""
    found = [problem for problem in problems.values() if problem]
    if len(found) == len(problems):
        return f"no rollout server could take version {version} of the weights: {found[0]}"
    for problem in found:
        logger.warning("left behind at version %s: %s", version, problem)
    return ""
