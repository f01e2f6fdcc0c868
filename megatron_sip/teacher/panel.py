"""The teacher of a run: asks the judges of each criterion, keeps their verdicts, weighs them together."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_sip.teacher.aggregate import mean_of_votes, weighted_total
from megatron_sip.teacher.http.failures import kind_of
from megatron_sip.teacher.interfaces import (
    FloatArray,
    GroupVerdict,
    Judge,
    JudgeGroup,
    JudgeRequest,
    JudgeResult,
    PairwiseJudge,
    PointwiseJudge,
    Question,
    RemotePart,
    Rewriter,
    RewriteRequest,
    RewriteResult,
    RunningJudge,
    Verdict,
)
from megatron_sip.teacher.ledger import Context
from megatron_sip.teacher.schedule import Comparison, follows_offsets, make_schedule
from megatron_sip.teacher.sources import Unrecorded, VerdictSource


@dataclass(frozen=True)
class PanelSettings:
    """How the panel asks; from TeacherConfig."""

    weights: Mapping[str, float]
    """Criterion -> weight in the total."""
    pair_schedule: str
    pair_pivot: str
    pair_order: str
    """"random": either option first, drawn per vote; "both": each vote asks both orders; "fixed": earlier first."""
    votes: int
    pair_budget: int = 0
    """Comparisons per group of a search; 0 for its default."""
    seed: int = 0
    """Of the random order."""
    criterion_votes: Mapping[str, int] = field(default_factory=dict)
    """Votes per question of criteria that differ."""

    def votes_of(self, criterion: str) -> int:
        return self.criterion_votes.get(criterion, self.votes)


@dataclass
class _Tally:
    """What was counted while a request was served."""

    latencies_s: list[float] = field(default_factory=list)
    num_cached: int = 0
    num_both_orders: int = 0
    num_flips: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


@dataclass
class _GroupTally:
    context: Context
    num_calls: int = 0
    num_failures: int = 0
    num_comparisons: int = 0


class Panel:
    """Judges of each criterion and a rewriter behind one ``Teacher``. Groups are judged concurrently."""

    def __init__(
        self,
        quality: PairwiseJudge | None,
        pointwise: Sequence[PointwiseJudge],
        rewriter: Rewriter,
        settings: PanelSettings,
        source: VerdictSource | None = None,
        *,
        coherence: PairwiseJudge | None = None,
        remote: RemotePart | None = None,
    ) -> None:
        """``source``: where verdicts come from, if not from the judges alone; closed with the panel.

        ``remote``: likewise; its counts go into results.
        """
        self._quality = quality
        self._coherence = coherence
        self._remote = remote
        self._reported: Mapping[str, int] = {}
        self._pointwise = tuple(pointwise)
        self._rewriter = rewriter
        self._settings = settings
        self._source = source or Unrecorded()
        judges: list[Judge] = [*self._pointwise] if quality is None else [quality, *self._pointwise]
        self._running: dict[str, RunningJudge] = {j.criterion: j for j in judges if isinstance(j, RunningJudge)}
        self._order = asyncio.Lock()

    @property
    def learns(self) -> bool:
        return bool(self._running)

    async def judge(self, request: JudgeRequest) -> JudgeResult:
        if not self._running:
            return await self._judge(request)
        # Running statistics make verdicts depend on the order of requests: that of submission (the lock is fair).
        async with self._order:
            if request.learn:
                for judge in self._running.values():
                    judge.observe(request.groups)
            return await self._judge(request)

    async def rewrite(self, request: RewriteRequest) -> RewriteResult:
        return RewriteResult(tuple(await self._source.rewrite(self._rewriter, request.items, request.step)))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {criterion: judge.state_dict() for criterion, judge in self._running.items()}
        recorded = self._source.state_dict()
        return state | ({"verdicts": recorded} if recorded else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for criterion, judge in self._running.items():
            judge.load_state_dict(state.get(criterion, {}))
        self._source.load_state_dict({**state.get("verdicts", {}), **state.get("again", {})})

    async def aclose(self) -> None:
        if self._remote is not None:
            await self._remote.aclose()
        self._source.close()

    async def _judge(self, request: JudgeRequest) -> JudgeResult:
        tally = _Tally()
        contexts = [Context(group.sample_id, request.step, group) for group in request.groups]
        groups = await asyncio.gather(
            *(self._judge_group(group, tally, context) for group, context in zip(request.groups, contexts, strict=True))
        )
        return JudgeResult(
            groups=tuple(groups),
            num_cached=tally.num_cached,
            num_both_orders=tally.num_both_orders,
            num_flips=tally.num_flips,
            latencies_s=np.array(tally.latencies_s),
            failures=dict(tally.failures),
            examples=tally.examples,
            remote=self._take_remote_counts(),
        )

    def _take_remote_counts(self) -> dict[str, int]:
        """What was counted since the last result. Of requests that overlap, the first to end takes all."""
        if self._remote is None:
            return {}
        counts = dict(self._remote.counts())
        new = {name: count - self._reported.get(name, 0) for name, count in counts.items()}
        self._reported = counts
        return new

    async def _judge_group(self, group: JudgeGroup, tally: _Tally, context: Context) -> GroupVerdict:
        start, counts = time.perf_counter(), _GroupTally(context)
        size, weights = len(group.candidates), self._settings.weights
        none = np.zeros(size)
        asked = {j.criterion: self._ask_pointwise(j, group, tally, counts) for j in self._pointwise}
        if self._coherence is not None:
            asked["coherence"] = self._ask_pairs(self._coherence, group, none, tally, counts)
        if self._quality is not None and not follows_offsets(self._settings.pair_schedule):
            asked["quality"] = self._ask_pairs(self._quality, group, none, tally, counts)
        # All at once: their servers differ, or batch them.
        criteria = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
        if self._quality is not None and "quality" not in criteria:
            others = weighted_total(criteria, {c: weights[c] for c in criteria}, size)
            offsets = others / weights["quality"] if weights["quality"] else none
            criteria["quality"] = await self._ask_pairs(self._quality, group, offsets, tally, counts)
        total = weighted_total(criteria, {c: weights[c] for c in criteria}, size)
        latency = time.perf_counter() - start
        return GroupVerdict(
            total, criteria, counts.num_calls, counts.num_failures, counts.num_comparisons, latency_s=latency
        )

    async def _ask_pointwise(
        self, judge: PointwiseJudge, group: JudgeGroup, tally: _Tally, counts: _GroupTally
    ) -> FloatArray:
        votes = self._settings.votes_of(judge.criterion)
        questions = [Question(group, (c,), v) for c in range(len(group.candidates)) for v in range(votes)]
        verdicts = await self._ask(judge, questions, tally, counts)
        return np.array(
            [mean_of_votes([v.score for v in verdicts[c * votes : (c + 1) * votes]]) for c in range(len(group.kinds))]
        )

    async def _ask_pairs(
        self, judge: PairwiseJudge, group: JudgeGroup, offsets: FloatArray, tally: _Tally, counts: _GroupTally
    ) -> FloatArray:
        settings = self._settings
        schedule = make_schedule(
            settings.pair_schedule, group.kinds, settings.pair_pivot, offsets, settings.pair_budget
        )
        # A schedule that asks a pair again wants new votes, not the old ones from the ledger.
        asked: dict[tuple[int, int], int] = defaultdict(int)
        while pairs := schedule.next_round():
            questions, owners = [], []
            for pair in pairs:
                for _ in range(settings.votes_of(judge.criterion)):
                    vote = asked[pair]
                    asked[pair] += 1
                    for options in self._presented(group.sample_id, pair, vote):
                        questions.append(Question(group, options, vote))
                        owners.append((pair, vote))
            verdicts = await self._ask(judge, questions, tally, counts)
            counts.num_comparisons += len(pairs)
            wins: dict[tuple[int, int], dict[int, list[float]]] = {pair: defaultdict(list) for pair in pairs}
            for question, (pair, vote), verdict in zip(questions, owners, verdicts, strict=True):
                wins[pair][vote].append(verdict.score if question.options == pair else 1 - verdict.score)
            for by_vote in wins.values():
                self._count_flips(by_vote.values(), tally)
            schedule.record([_comparison(pair, [mean_of_votes(v) for v in wins[pair].values()]) for pair in pairs])
        return schedule.scores()

    def _presented(self, sample_id: int, pair: tuple[int, int], vote: int) -> list[tuple[int, int]]:
        first, second = pair
        if self._settings.pair_order == "both":
            return [(first, second), (second, first)]
        if self._settings.pair_order == "random":
            # Drawn from the question itself, so that it depends neither on the batch nor on the layout.
            key = f"{self._settings.seed} {sample_id} {first} {second} {vote}"
            digest = hashlib.sha256(key.encode()).digest()
            if digest[0] & 1:
                return [(second, first)]
        return [(first, second)]

    @staticmethod
    def _count_flips(votes: Any, tally: _Tally) -> None:
        """``votes``: per vote the wins of the same option, one entry per order."""
        for wins in votes:
            if len(wins) == 2 and np.isfinite(wins).all():
                tally.num_both_orders += 1
                tally.num_flips += wins[0] != wins[1]

    async def _ask(
        self, judge: Judge, questions: Sequence[Question], tally: _Tally, counts: _GroupTally
    ) -> list[Verdict]:
        given = await self._source.ask(judge, questions, counts.context)
        self._count([answer.verdict for answer in given if not answer.cached], tally, counts)
        tally.num_cached += sum(answer.cached for answer in given)
        return [answer.verdict for answer in given]

    @staticmethod
    def _count(verdicts: Sequence[Verdict], tally: _Tally, counts: _GroupTally) -> None:
        counts.num_calls += len(verdicts)
        missing = [v for v in verdicts if np.isnan(v.score)]
        counts.num_failures += len(missing)
        for verdict in missing:
            kind = kind_of(verdict.failure)
            tally.failures[kind] += 1
            tally.examples.setdefault(kind, verdict.failure)
        tally.latencies_s += [v.latency_s for v in verdicts]


def _comparison(pair: tuple[int, int], votes: Sequence[float]) -> Comparison:
    return Comparison(*pair, win=mean_of_votes(votes), votes=int(np.isfinite(votes).sum()))
