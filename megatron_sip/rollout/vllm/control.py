"""Calls that steer a vLLM server: its answers, and what its failures mean."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import aiohttp

from megatron_sip.errors import RolloutError
from megatron_sip.teacher.http.failures import TRANSPORT, failure_of_status
from megatron_sip.teacher.http.reply import decode_json

START = (
    "start it as tools/export_policy.py --for-rollouts prints: VLLM_SERVER_DEV_MODE=1 vllm serve ... --enable-scale-out"
)
CONNECT_S = 10.0
UPDATING = "updating to "
"""Begins the version of weights that are being replaced: a server that keeps it has been left half updated."""
FRESH = "default"
"""The version that a server starts with."""
_ATTEMPTS = 3
_CACHE_ATTEMPTS = 20


class Unreachable(Exception):
    """A server that does not answer, or with a failure of its own: it may be back later."""


async def get(session: aiohttp.ClientSession, url: str, path: str) -> dict[str, Any]:
    """The decoded JSON of a 200. Raises Unreachable, or RolloutError where asking again is of no use."""
    return await _call(session, url, "GET", path, None, _ATTEMPTS)


async def post(session: aiohttp.ClientSession, url: str, path: str, **body: Any) -> dict[str, Any]:
    """The same with a body. Only for what may be done twice."""
    return await _call(session, url, "POST", path, body or None, _ATTEMPTS)


async def post_once(session: aiohttp.ClientSession, url: str, path: str, **body: Any) -> dict[str, Any]:
    """The same for what must not be done twice, whether or not the answer came."""
    return await _call(session, url, "POST", path, body or None, 1)


async def look_once(session: aiohttp.ClientSession, url: str) -> None:
    """Raises Unreachable, without the patience of the other calls: a server that was lost is still not there."""
    await send(session, url, "GET", "/health", None, attempts=1)


async def send(
    session: aiohttp.ClientSession, url: str, method: str, path: str, body: Any, attempts: int = _ATTEMPTS
) -> tuple[int, Any]:
    """(status, decoded JSON). Raises Unreachable if there was no HTTP answer."""
    for attempt in range(1, attempts + 1):
        try:
            async with session.request(method, url + path, json=body) as response:
                return response.status, decode_json(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if attempt == attempts:
                text = str(error) or type(error).__name__
                raise Unreachable(f"rollout server {url}: {TRANSPORT}: {text}") from error
        await asyncio.sleep(0.5 * attempt)
    raise AssertionError("unreachable")


async def begin_update(session: aiohttp.ClientSession, url: str, version: str) -> None:
    """Nothing is generated from here to ``end_update``. A server that is lost in between stays paused and marked."""
    await post(session, url, "/pause?mode=wait")
    await post(session, url, "/update_weight_version", new_version=f"{UPDATING}{version}")


async def end_update(session: aiohttp.ClientSession, url: str) -> None:
    """The new weights answer from now on, and nothing that the old ones have left in the prefix cache."""
    for _ in range(_CACHE_ATTEMPTS):
        if (await post(session, url, "/reset_prefix_cache")).get("success"):
            break
        await asyncio.sleep(0.1)
    else:
        raise RolloutError(
            f"rollout server {url} does not let go of its prefix cache: it would answer from old weights"
        )
    await post(session, url, "/resume")


async def version_of(session: aiohttp.ClientSession, url: str) -> str:
    """Of its weights: a number, ``default`` after a start, or with ``UPDATING`` before it."""
    return str((await get(session, url, "/weight_info")).get("weight_version"))


def half_updated(url: str, version: str) -> Unreachable:
    """What to say of a server that was lost in the middle of an update."""
    return Unreachable(
        f"rollout server {url} was left half updated ({version!r}) by a transfer that broke off and stays paused: "
        "restart it"
    )


async def _call(
    session: aiohttp.ClientSession, url: str, method: str, path: str, body: Any, attempts: int
) -> dict[str, Any]:
    status, data = await send(session, url, method, path, body, attempts)
    if status == 200:
        return data if isinstance(data, dict) else {}
    name = path.partition("?")[0]
    if status == 404:
        raise RolloutError(f"rollout server {url} has no {name}: {START}")
    failure = failure_of_status(status, data, {}, datetime.datetime.now(datetime.UTC))
    if failure.transient:
        raise Unreachable(f"rollout server {url}: {name}: {failure}")
    raise RolloutError(f"rollout server {url} refuses {name}: {failure}")
