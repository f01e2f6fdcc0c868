"""A teacher whose rounds take as long as it is told, for benchmarks/overlap.py: the real panel, without servers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import JudgeIdentity, Question, Verdict
from megatron_sip.teacher.panel import Panel, PanelSettings
from megatron_sip.teacher.rewriter import CopyRewriter


class SlowJudge:
    """Prefers an option by its text alone, ``round_s`` after it was asked: rounds of several groups run at once."""

    criterion = "quality"

    def __init__(self, round_s: float) -> None:
        self._round_s = round_s

    def identity(self) -> JudgeIdentity:
        return JudgeIdentity("slow", "none", "")

    def prompt_hash(self, question: Question) -> str:
        texts = [question.group.candidates[option].text for option in question.options]
        return hashlib.sha256("\0".join([question.group.prefix.text, *texts]).encode()).hexdigest()

    async def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        await asyncio.sleep(self._round_s)
        return [Verdict(float(self._digest(q, 0) > self._digest(q, 1)), latency_s=self._round_s) for q in questions]

    @staticmethod
    def _digest(question: Question, place: int) -> bytes:
        return hashlib.sha256(question.group.candidates[question.options[place]].text.encode()).digest()


def build(config: TeacherConfig, round_s: float, **options: Any) -> Panel:
    """The factory that the teacher process calls."""
    settings = PanelSettings(
        weights=config.weights,
        pair_schedule=config.pair_schedule,
        pair_pivot=config.pair_pivot,
        pair_order=config.pair_order,
        votes=1,
        pair_budget=config.pair_budget,
    )
    return Panel(SlowJudge(round_s), [], CopyRewriter(), settings)
