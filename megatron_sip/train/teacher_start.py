"""Starts the teacher's process: the light one, or one that holds models of ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import JudgeError
from megatron_sip.teacher import TeacherProcess
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http.greeting import Greetings, greet
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig

_MODELS = "megatron_sip.train.model_teacher:build_model_teacher"
_LOADING_S = 600.0
"""To import Megatron-Core and load a checkpoint."""
_ASK_EVERY_S = 3.0
_SAY_EVERY_S = 60.0


def await_servers(
    teacher: TeacherConfig, roles: Mapping[str, int], context: ParallelContext, say: Callable[[str], None]
) -> None:
    """Returns when each of ``roles`` has a server that can be asked; says what is wrong with others. Collective.

    No rank is in a collective for longer than one question for the lists of models. ``say`` prints on rank 0.

    Raises:
        JudgeError: there is none for a role: it serves another model or refuses the key, or it has not come within
            ``judge_start_wait_s``. The message is the same on all ranks.
    """
    key = os.environ.get(teacher.judge_api_key_env, "")
    limit_s, started, said_s = teacher.judge_start_wait_s, time.monotonic(), 0.0
    while True:
        own = (greet(teacher, roles, key), time.monotonic() - started) if context.rank == 0 else None
        answer = context.broadcast_from_rank_zero(own)
        assert answer is not None
        greetings, waited_s = answer
        if not greetings.unserved:
            break
        if not greetings.may_come or waited_s >= limit_s:
            raise JudgeError(_unserved(greetings, waited_s, limit_s))
        if not said_s or waited_s - said_s >= _SAY_EVERY_S:
            said_s = waited_s
            say(
                f"waiting for judge servers since {waited_s:.0f} s (of {limit_s:g} s, --judge-start-wait-s): "
                + "; ".join(greetings.unserved)
            )
        time.sleep(min(_ASK_EVERY_S, max(0.0, limit_s - waited_s)))
    for line in greetings.complaints:
        say(f"{line}; the run starts all the same")


def _unserved(greetings: Greetings, waited_s: float, limit_s: float) -> str:
    lines = "; ".join(greetings.unserved)
    if not greetings.may_come:
        return lines
    return (
        f"{lines}. None came within {waited_s:.0f} s: for servers that start later give a longer --judge-start-wait-s "
        f"than {limit_s:g}"
    )


def diagnosis(teacher: TeacherConfig, roles: Mapping[str, int]) -> str:
    """What is wrong with the servers now, in a few seconds; "" if nothing is."""
    return "; ".join(greet(teacher, roles, os.environ.get(teacher.judge_api_key_env, "")).complaints) if roles else ""


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
