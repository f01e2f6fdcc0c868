"""Starts the teacher's process: the light one, or one that holds models of ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from megatron_sip.distributed import ParallelContext
from megatron_sip.teacher import TeacherProcess
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http import waiting
from megatron_sip.teacher.http.greeting import complaints
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig

_MODELS = "megatron_sip.train.model_teacher:build_model_teacher"
_LOADING_S = 600.0
"""To import Megatron-Core and load a checkpoint."""


def await_servers(
    teacher: TeacherConfig, roles: Mapping[str, int], context: ParallelContext, say: Callable[[str], None]
) -> None:
    """Returns when each of ``roles`` has a server that can be asked. Collective; ``say`` prints on rank 0.

    Raises:
        JudgeError: as ``teacher.http.waiting`` says, on all ranks alike.
    """
    waiting.await_servers(
        teacher, roles, _key(teacher), say, is_asking=context.rank == 0, share=context.broadcast_from_rank_zero
    )


def diagnosis(teacher: TeacherConfig, roles: Mapping[str, int]) -> str:
    """What is wrong with the servers now, in a few seconds; "" if nothing is."""
    return "; ".join(complaints(teacher, roles, _key(teacher))) if roles else ""


def _key(teacher: TeacherConfig) -> str:
    return os.environ.get(teacher.judge_api_key_env, "")


def start_process(
    teacher: TeacherConfig,
    tokenizer_config: TokenizerConfig,
    tokenizer: Tokenizer,
    context: ParallelContext,
    *,
    judging: bool,
    rewriting: bool,
    seed: int,
) -> TeacherProcess | None:
    """The replica's teacher on its leader, None elsewhere. ``tokenizer_config``: the run's own, which models of ours
    share unless they name another. ``seed``: the run's, which draws the order in which pairs are shown."""
    if not context.is_leader:
        return None
    options = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "judging": judging,
        "rewriting": rewriting,
        "replica": context.dp_rank,
        "num_replicas": context.dp_size,
        "seed": seed,
    }
    if not teacher.uses_models(judging, rewriting):
        return TeacherProcess(teacher, options)
    return TeacherProcess(
        teacher, {**options, "tokenizer": tokenizer_config}, factory=_MODELS, start_timeout_s=_LOADING_S
    )
