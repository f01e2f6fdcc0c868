"""vLLM servers: questions by token ids, and new weights. Lives on a replica's leader, in an event loop of its own."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np

from megatron_sip.errors import CheckpointError, RolloutError
from megatron_sip.huggingface.config_json import read_config
from megatron_sip.rollout.vllm.config import VllmOptions
from megatron_sip.teacher.http.client import ClientSettings, HttpClient
from megatron_sip.teacher.http.failures import SERVER, TRANSPORT, Failure, failure_of_status
from megatron_sip.teacher.http.reply import decode_json
from megatron_sip.types import FloatArray, IntArray

logger = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
_START = (
    "start it as tools/export_policy.py --for-rollouts prints: VLLM_SERVER_DEV_MODE=1 vllm serve ... --enable-scale-out"
)
_CONNECT_S = 10.0
_CONTROL_ATTEMPTS = 3
_CACHE_ATTEMPTS = 20

T = TypeVar("T")


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
    """A synchronous face on several servers."""

    def __init__(self, options: VllmOptions, replica: int) -> None:
        """``replica``: replicas begin with different servers."""
        self._urls = [url.rstrip("/") for url in options.rollout_endpoints]
        self._timeout_s = options.rollout_request_timeout_s
        key = os.environ.get(options.rollout_api_key_env, "")
        settings = ClientSettings(
            max_in_flight=options.rollout_max_in_flight,
            connect_timeout_s=_CONNECT_S,
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
        self._client: HttpClient[Answer] = HttpClient(self._urls, settings, GENERATE, read_answer, key)
        self._loop = asyncio.new_event_loop()
        self.longest = 0
        """Tokens of a sequence, on every server; known after ``check``."""

    def ask(self, bodies: Sequence[Mapping[str, Any]]) -> list[Answer | Failure]:
        """An answer to each, in order."""

        async def ask_all() -> list[Answer | Failure]:
            return list(await asyncio.gather(*(self._client.complete(partial(dict, body)) for body in bodies)))

        return self._run(ask_all())

    def check(self, vocab_size: int, tied: bool) -> None:
        """Finds what would make answers wrong or syncing impossible, on every server. ``tied``: the output layer.

        Raises:
            RolloutError: names server, value and remedy.
        """
        self.longest = min(self._run(self._on_all(lambda url, s: _check_server(url, s, vocab_size, tied))))

    def sync(self, directory: Path, version: int, only_stale: bool = False) -> None:
        """Puts the weights of a directory into every server that can be reached.

        A server that cannot is told of and left behind: its answers carry another version, and ``only_stale``, which
        skips servers of the right one, brings it up to date.

        Raises:
            RolloutError: none could, or one refused.
        """

        async def update(url: str, session: aiohttp.ClientSession) -> str:
            try:
                if only_stale and (await _get(session, url, "/weight_info")).get("weight_version") == str(version):
                    return ""
                await _update(session, url, directory, str(version))
            except _Unreachable as error:
                return str(error)
            return ""

        problems = self._run(self._on_all(update))
        found = [problem for problem in problems if problem]
        if len(found) == len(problems):
            raise RolloutError(f"no rollout server could take version {version} of the weights: {found[0]}")
        for problem in found:
            logger.warning("left behind at version %d: %s", version, problem)

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    async def _on_all(self, act: Any) -> list[Any]:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=_CONNECT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            return list(await asyncio.gather(*(act(url, session) for url in self._urls)))


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
        return Failure(SERVER, f"a choice lacks {error}: {_START}", transient=False)


def _continuation(choice: Mapping[str, Any]) -> Continuation:
    scored = choice["logprobs"]["content"]
    return Continuation(
        tokens=np.array(choice["token_ids"], dtype=np.int64),
        log_probs=np.array([entry["logprob"] for entry in scored], dtype=np.float32),
        ended=choice["finish_reason"] == "stop",
        versions=tuple(span["version"] for span in choice["weight_versions"]),
    )


class _Unreachable(Exception):
    """A server that does not answer, or with a failure of its own."""


async def _check_server(url: str, session: aiohttp.ClientSession, vocab_size: int, tied: bool) -> int:
    """Raises RolloutError; returns the longest sequence."""
    try:
        models = await _get(session, url, "/v1/models")
        info = (await _get(session, url, "/server_info?config_format=json"))["vllm_config"]
        rows = []
        for token in (vocab_size - 1, vocab_size):
            body = {"token_ids": [token], "sampling_params": {"max_tokens": 1, "temperature": 0.0, "detokenize": False}}
            status, _ = await _send(session, url, "POST", GENERATE, body)
            if status == 404:
                raise RolloutError(f"rollout server {url} has no {GENERATE}: {_START}")
            rows.append(status == 200)
    except _Unreachable as error:
        raise RolloutError(str(error)) from error
    if rows != [True, False]:
        raise RolloutError(
            f"rollout server {url} has {'more' if all(rows) else 'fewer'} tokens than the tokenizer's {vocab_size}: "
            "let it serve what tools/export_policy.py writes, which has these and no others"
        )
    mode = info["model_config"]["logprobs_mode"]
    if mode != "raw_logprobs":
        raise RolloutError(f"rollout server {url} gives {mode}: start it with --logprobs-mode raw_logprobs")
    if info["device_config"].get("device_type") == "cpu":
        _check_cpu_server(url, info, tied)
    return int(models["data"][0]["max_model_len"])


def _check_cpu_server(url: str, info: Mapping[str, Any], tied: bool) -> None:
    """What vLLM 0.32.0 does wrong on a CPU. Raises RolloutError."""
    if info["scheduler_config"].get("enable_chunked_prefill"):
        raise RolloutError(f"rollout server {url} would die of a seed: start it with --no-enable-chunked-prefill")
    # It packs the output layer, and does not pack that of a tied model anew when the embedding is reloaded.
    if tied and _serves_tied_model(Path(info["model_config"]["model"])):
        raise RolloutError(
            f"rollout server {url} would keep the old output layer, which is tied: let it serve what "
            "tools/export_policy.py --untie writes"
        )


def _serves_tied_model(directory: Path) -> bool:
    """Also where its directory is out of sight."""
    try:
        return bool(read_config(directory).get("tie_word_embeddings", True))
    except CheckpointError:
        return True


async def _update(session: aiohttp.ClientSession, url: str, directory: Path, version: str) -> None:
    """Nothing is generated between the first and the last call."""
    await _post(session, url, "/pause?mode=wait")
    # A reload that fails leaves the model half updated: it stays paused then.
    await _post(session, url, "/collective_rpc", method="reload_weights", kwargs={"weights_path": str(directory)})
    await _post(session, url, "/update_weight_version", new_version=version)
    for _ in range(_CACHE_ATTEMPTS):
        if (await _post(session, url, "/reset_prefix_cache")).get("success"):
            break
        await asyncio.sleep(0.1)
    else:
        raise RolloutError(
            f"rollout server {url} does not let go of its prefix cache: it would answer from old weights"
        )
    await _post(session, url, "/resume")


async def _get(session: aiohttp.ClientSession, url: str, path: str) -> dict[str, Any]:
    return await _call(session, url, "GET", path, None)


async def _post(session: aiohttp.ClientSession, url: str, path: str, **body: Any) -> dict[str, Any]:
    return await _call(session, url, "POST", path, body or None)


async def _call(session: aiohttp.ClientSession, url: str, method: str, path: str, body: Any) -> dict[str, Any]:
    """The decoded JSON of a 200. Raises _Unreachable or RolloutError."""
    status, data = await _send(session, url, method, path, body)
    if status == 200:
        return data if isinstance(data, dict) else {}
    name = path.partition("?")[0]
    if status == 404:
        raise RolloutError(f"rollout server {url} has no {name}: {_START}")
    failure = failure_of_status(status, data, {}, datetime.datetime.now(datetime.UTC))
    if failure.transient:
        raise _Unreachable(f"rollout server {url}: {name}: {failure}")
    raise RolloutError(f"rollout server {url} refuses {name}: {failure}")


async def _send(session: aiohttp.ClientSession, url: str, method: str, path: str, body: Any) -> tuple[int, Any]:
    """(status, decoded JSON). Raises _Unreachable if there was no HTTP answer."""
    for attempt in range(1, _CONTROL_ATTEMPTS + 1):
        try:
            async with session.request(method, url + path, json=body) as response:
                return response.status, decode_json(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if attempt == _CONTROL_ATTEMPTS:
                text = str(error) or type(error).__name__
                raise _Unreachable(f"rollout server {url}: {TRANSPORT}: {text}") from error
        await asyncio.sleep(0.5 * attempt)
    raise AssertionError("unreachable")
