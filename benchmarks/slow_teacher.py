"""A teacher whose rounds take as long as it is told, for benchmarks/overlap.py: the real panel, without servers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import (
    JudgeIdentity,
    JudgeRequest,
    JudgeResult,
    Question,
    Rewrite,
    RewriteItem,
    Verdict,
)
from megatron_sip.teacher.panel import Panel, PanelSettings
from megatron_sip.teacher.rewriter import CopyRewriter

_ROUND_S: ContextVar[float] = ContextVar("round_s", default=0.0)
"""Of the request that is being served; requests overlap."""


class SlowJudge:
    """Prefers an option by its text alone, after the time that a round takes: those of several groups run at once."""

    criterion = "quality"

    def identity(self) -> JudgeIdentity:
        return JudgeIdentity("slow", "none", "")

    def prompt_hash(self, question: Question) -> str:
        texts = [question.group.candidates[option].text for option in question.options]
        return hashlib.sha256("\0".join([question.group.prefix.text, *texts]).encode()).hexdigest()

    async def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        round_s = _ROUND_S.get()
        await asyncio.sleep(round_s)
        return [Verdict(float(self._digest(q, 0) > self._digest(q, 1)), latency_s=round_s) for q in questions]

    @staticmethod
    def _digest(question: Question, place: int) -> bytes:
        return hashlib.sha256(question.group.candidates[question.options[place]].text.encode()).digest()


class SlowPanel(Panel):
    """Each step has its own time of a round."""

    round_s: Sequence[float] = ()

    async def judge(self, request: JudgeRequest) -> JudgeResult:
        # The teacher's process serves each request in a task, and so in a context, of its own.
        _ROUND_S.set(self.round_s[min(request.step or 0, len(self.round_s) - 1)])
        return await super().judge(request)


class SlowRewriter(CopyRewriter):
    """Answers all of a request after ``rewrite_s``."""

    def __init__(self, rewrite_s: float) -> None:
        self._rewrite_s = rewrite_s

    async def rewrite(self, items: Sequence[RewriteItem]) -> list[Rewrite]:
        await asyncio.sleep(self._rewrite_s)
        return await super().rewrite(items)


def build(config: TeacherConfig, round_s: Sequence[float], rewrite_s: float = 0.0, **options: Any) -> Panel:
    """The factory that the teacher process calls. ``round_s``: by step, the last one for all that follow."""
    settings = PanelSettings(
        weights=config.weights,
        pair_schedule=config.pair_schedule,
        pair_pivot=config.pair_pivot,
        pair_order=config.pair_order,
        votes=1,
        pair_budget=config.pair_budget,
    )
    panel = SlowPanel(SlowJudge(), [], SlowRewriter(rewrite_s), settings)
    panel.round_s = round_s
    return panel
