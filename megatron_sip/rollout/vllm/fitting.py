"""Whether a server can serve this run: what would make answers wrong, or weights impossible to hand over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from megatron_sip.errors import CheckpointError, ConfigurationError, RolloutError
from megatron_sip.huggingface.config_json import architecture_of, read_config
from megatron_sip.rollout.vllm.control import START, Unreachable, get, send

GENERATE = "/inference/v1/generate"
_FREE = ("untie_embeddings_and_output_weights", "max_position_embeddings")
"""Fields in which a server's model may differ: it gets both layers' weights, and its longest sequence is asked for."""


@dataclass(frozen=True)
class Needs:
    """What a run needs of its servers."""

    vocab_size: int
    """Tokens of the tokenizer, and rows of the model."""
    tied: bool
    """Whether embedding and output layer are one."""
    model_config: Mapping[str, Any]
    """``config.json`` of the model."""
    transfer: str
    """Value of ``--rollout-weight-transfer``."""


async def check_server(url: str, session: aiohttp.ClientSession, needs: Needs) -> int:
    """The longest sequence of a server that fits, in tokens.

    Raises:
        RolloutError: it does not fit; names server, value and remedy.
        Unreachable: it is not there.
    """
    models = await get(session, url, "/v1/models")
    info = (await get(session, url, "/server_info?config_format=json"))["vllm_config"]
    rows = []
    for token in (needs.vocab_size - 1, needs.vocab_size):
        # Of the prompt's tokens it asks its tokenizer, and has none with --skip-tokenizer-init.
        wanted = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "logit_bias": {str(token): 0.0}}
        status, _ = await send(session, url, "POST", GENERATE, {"token_ids": [0], "sampling_params": wanted})
        if status in (403, 404):  # vLLM 0.32 forbids it without --enable-scale-out, others do not know it
            raise RolloutError(f"rollout server {url} has no {GENERATE}: {START}")
        if status >= 500:
            raise Unreachable(f"rollout server {url}: {GENERATE}: HTTP {status}")
        rows.append(status == 200)
    if rows != [True, False]:
        raise RolloutError(
            f"rollout server {url} has {'more' if all(rows) else 'fewer'} tokens than the tokenizer's "
            f"{needs.vocab_size}: let it serve what tools/export_policy.py writes, which has these and no others"
        )
    _check_shape(url, Path(info["model_config"]["model"]), needs.model_config)
    mode = info["model_config"]["logprobs_mode"]
    if mode != "raw_logprobs":
        raise RolloutError(f"rollout server {url} gives {mode}: start it with --logprobs-mode raw_logprobs")
    if info["device_config"].get("device_type") == "cpu":
        _check_cpu_server(url, info, needs.tied)
    _check_transfer(url, info, needs.transfer)
    return int(models["data"][0]["max_model_len"])


def _check_shape(url: str, directory: Path, ours: Mapping[str, Any]) -> None:
    """Where the server's directory is in sight: weights of another shape would leave it half updated."""
    try:
        theirs = architecture_of(read_config(directory), directory)
    except CheckpointError:
        return
    except ConfigurationError as error:
        raise RolloutError(f"rollout server {url} serves another model: {error}") from error
    own = dataclasses.asdict(architecture_of(ours, directory))
    for name, value in dataclasses.asdict(theirs).items():
        if value != own[name] and name not in _FREE:
            raise RolloutError(
                f"rollout server {url} serves a model whose {name} is {value} and not {own[name]}: let it serve what "
                "tools/export_policy.py writes of this run"
            )


def _check_transfer(url: str, info: Mapping[str, Any], transfer: str) -> None:
    if transfer == "files":
        return
    backend = (info.get("weight_transfer_config") or {}).get("backend")
    if backend != transfer:
        raise RolloutError(
            f"rollout server {url} takes weights by {backend or 'files alone'} and not by {transfer}: start it as "
            f"tools/export_policy.py --for-rollouts --weight-transfer {transfer} prints"
        )


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
