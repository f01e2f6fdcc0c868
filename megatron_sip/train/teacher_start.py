"""Starts the teacher's process: the light one, or one that holds models of ours."""

from __future__ import annotations

from megatron_sip.distributed import ParallelContext
from megatron_sip.teacher import TeacherProcess
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig

_MODELS = "megatron_sip.train.model_teacher:build_model_teacher"
_LOADING_S = 600.0
"""To import Megatron-Core and load a checkpoint."""


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
