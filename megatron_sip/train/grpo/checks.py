"""What a training of the teacher needs and this machine may lack, looked for before any process group starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sip.data.config import parse_blend
from megatron_sip.train.checks import (
    missing_checkpoints,
    missing_kernels,
    missing_teacher,
    missing_tokenizer,
    require_none,
    unwritable,
)

if TYPE_CHECKING:
    from megatron_sip.train.grpo.config import GRPORunConfig


def find_missing(config: GRPORunConfig, task: str) -> list[str]:
    """One line for each thing that the training of ``task`` lacks."""
    teacher = config.teacher
    return [
        *_missing_examples(config),
        *missing_tokenizer(config.tokenizer),
        *missing_kernels(config.model),
        *missing_checkpoints(config.checkpoint),
        # A judge is rewarded by labels; a rewriter asks judges, and nobody for rewrites.
        *(missing_teacher(teacher, judging=True, rewriting=False) if task == "rewriter" else ()),
        *_missing_embedded_judge(config, task),
        *unwritable(config.checkpoint, config.observability, teacher.judge_ledger),
    ]


def require_present(config: GRPORunConfig, task: str) -> None:
    """Raise ConfigurationError for the first thing that ``find_missing`` finds."""
    require_none(find_missing(config, task))


def _missing_examples(config: GRPORunConfig) -> Iterator[str]:
    trained = {os.path.realpath(path) for path in parse_blend(config.task.train_data)[0]}
    for flag, values in (("--train-data", config.task.train_data), ("--valid-data", config.task.valid_data)):
        for path in parse_blend(values, flag)[0]:
            if not Path(path).is_file():
                yield f"{flag}: no file {path}; tools/make_judge_data.py writes them"
            elif not Path(path).stat().st_size:
                yield f"{flag}: {path} is empty; tools/make_judge_data.py has made none of these examples"
            elif flag == "--valid-data" and os.path.realpath(path) in trained:
                yield f"{flag}: {path} is also in --train-data; give what is held out, or none"


def _missing_embedded_judge(config: GRPORunConfig, task: str) -> Iterator[str]:
    teacher = config.teacher
    if task == "rewriter" and teacher.teacher == "embedded" and not (teacher.judge_model or teacher.replay_judgments):
        yield (
            "--judge-model: none, and eq. 2 compares an unsafe suffix with its rewrite; give --teacher model with the "
            "--judge-checkpoint of tools/train_judge.py, --teacher http, or what tools/fit_judge.py wrote"
        )
