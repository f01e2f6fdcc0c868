"""Where the panel gets verdicts from: the judges themselves, the judges with a ledger, or a recorded run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from megatron_sip.errors import JudgeError
from megatron_sip.teacher.interfaces import (
    Judge,
    JudgeIdentity,
    Question,
    RecordableRewriter,
    Rewrite,
    RewriteItem,
    Rewriter,
    Verdict,
)
from megatron_sip.teacher.ledger import REWRITER, Asked, Context, Ledger, prompt_key

NAN = float("nan")
_Key = tuple[str, JudgeIdentity, Asked]


class Given(NamedTuple):
    verdict: Verdict
    cached: bool
    """True if no call was made for it."""


class VerdictSource(Protocol):
    """What stands between the panel and its judges and rewriter."""

    async def ask(self, judge: Judge, questions: Sequence[Question], context: Context) -> list[Given]:
        """One verdict per question, in order. ``context``: of the group that all questions are about."""
        ...

    async def rewrite(self, rewriter: Rewriter, items: Sequence[RewriteItem], step: int | None) -> Sequence[Rewrite]:
        """One rewrite per item, in order."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Unrecorded:
    """The judges, and nothing is kept."""

    async def ask(self, judge: Judge, questions: Sequence[Question], context: Context) -> list[Given]:
        return [Given(verdict, cached=False) for verdict in await judge.ask(questions)]

    async def rewrite(self, rewriter: Rewriter, items: Sequence[RewriteItem], step: int | None) -> Sequence[Rewrite]:
        return await rewriter.rewrite(items)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Recording:
    """Verdicts from the ledger where it has them, the others from the judge, which are then kept.

    One vote on one prompt is one verdict, also when it is asked twice at a time (a rewrite that copies the suffix,
    equal rollouts): the second waits for the first. So a vote is some failures and then at most one answer that stays.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._under_way: dict[_Key, asyncio.Future[Verdict]] = {}

    async def ask(self, judge: Judge, questions: Sequence[Question], context: Context) -> list[Given]:
        criterion, identity = judge.criterion, judge.identity()
        asked = asked_of(judge, questions)
        kept = self._ledger.find(criterion, identity, asked)
        ours: dict[Asked, Question] = {}
        theirs: dict[Asked, asyncio.Future[Verdict]] = {}
        for key, question in zip(asked, questions, strict=True):
            if key not in kept and key not in ours:
                other = self._under_way.get((criterion, identity, key))
                if other is None:
                    ours[key] = question
                else:
                    theirs[key] = other
        new = await self._ask(judge, identity, ours, context) if ours else {}
        shared = {key: await verdict for key, verdict in theirs.items()}
        # Each time that a failure was met is kept: replay meets it as often.
        self._keep(criterion, identity, context, {k: v for k, v in shared.items() if v.failure}, asked, questions)
        if kept:
            self._ledger.add_hits(criterion, identity, context.step, sum(key in kept for key in asked))
        calls = set(new)
        given = []
        for key in asked:
            given.append(Given(_first(key, new, shared, kept), cached=key not in calls))
            calls.discard(key)
        return given

    async def rewrite(self, rewriter: Rewriter, items: Sequence[RewriteItem], step: int | None) -> Sequence[Rewrite]:
        """Rules give the same each time and are not kept; what a model wrote is, word for word."""
        if not isinstance(rewriter, RecordableRewriter):
            return await rewriter.rewrite(items)
        return await asyncio.gather(*(self._rewrite(rewriter, item, step) for item in items))

    async def _rewrite(self, rewriter: RecordableRewriter, item: RewriteItem, step: int | None) -> Rewrite:
        identity, key = rewriter.identity(), rewrite_key(rewriter, item)
        kept = self._ledger.find(REWRITER, identity, [key], with_raw=True)
        if key in kept:
            self._ledger.add_hits(REWRITER, identity, step, 1)
            return rewrite_of(kept[key], item)
        other = self._under_way.get((REWRITER, identity, key))
        if other is not None:
            # Where the suffix is the same, so is the rewrite.
            verdict = await other
            if not verdict.failure:
                return rewrite_of(verdict, item)
        else:
            with self._promised([(REWRITER, identity, key)]) as promises:
                (rewrite,) = await rewriter.rewrite([item])
                score = NAN if rewrite.text is None else float(rewrite.copied)
                verdict = Verdict(score, rewrite.text or "", rewrite.failure, rewrite.latency_s)
                promises[REWRITER, identity, key].set_result(verdict)
        self._ledger.add(REWRITER, identity, Context(item.sample_id, step, item), [(key, (), verdict)], always_raw=True)
        return rewrite_of(verdict, item)

    async def _ask(
        self, judge: Judge, identity: JudgeIdentity, ours: Mapping[Asked, Question], context: Context
    ) -> dict[Asked, Verdict]:
        keys = {asked: (judge.criterion, identity, asked) for asked in ours}
        with self._promised(list(keys.values())) as promises:
            new = dict(zip(ours, await judge.ask(list(ours.values())), strict=True))
            self._keep(judge.criterion, identity, context, new, list(ours), list(ours.values()))
            for asked, key in keys.items():
                promises[key].set_result(new[asked])
        return new

    @contextmanager
    def _promised(self, keys: Sequence[_Key]) -> Iterator[dict[_Key, asyncio.Future[Verdict]]]:
        """Questions under way: whoever asks the same meanwhile waits for these."""
        loop = asyncio.get_running_loop()
        promises: dict[_Key, asyncio.Future[Verdict]] = {key: loop.create_future() for key in keys}
        self._under_way |= promises
        try:
            yield promises
        except BaseException as error:
            for promise in promises.values():
                if not promise.done():
                    promise.set_exception(JudgeError(f"the question was asked elsewhere, which failed: {error}"))
                    promise.exception()  # so that nobody waiting for it is no complaint
            raise
        finally:
            for key in keys:
                del self._under_way[key]

    def _keep(
        self, criterion: str, identity: JudgeIdentity, context: Context, verdicts: Mapping[Asked, Verdict],
        asked: Sequence[Asked], questions: Sequence[Question],
    ) -> None:  # fmt: skip
        options = {key: question.options for key, question in zip(asked, questions, strict=True)}
        if verdicts:
            votes = [(key, options[key], verdict) for key, verdict in verdicts.items()]
            self._ledger.add(criterion, identity, context, votes)

    def state_dict(self) -> dict[str, Any]:
        return self._ledger.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ledger.load_state_dict(state)

    def close(self) -> None:
        self._ledger.close()


def asked_of(judge: Judge, questions: Sequence[Question]) -> list[Asked]:
    """The ledger's keys. Votes of one question share the work of hashing its prompt."""
    prompts: dict[tuple[int, ...], bytes] = {}
    keys = []
    for question in questions:
        if question.options not in prompts:
            prompts[question.options] = prompt_key(judge.prompt_hash(question))
        keys.append(Asked(prompts[question.options], question.vote))
    return keys


def rewrite_key(rewriter: RecordableRewriter, item: RewriteItem) -> Asked:
    return Asked(prompt_key(rewriter.prompt_hash(item)), vote=0)


def rewrite_of(verdict: Verdict, item: RewriteItem) -> Rewrite:
    """A rewrite as it was kept."""
    if verdict.failure:
        return Rewrite(None, failure=verdict.failure)
    copied = verdict.score == 1.0
    return Rewrite(item.suffix.text if copied else verdict.raw, copied)


def _first(key: Asked, *places: Mapping[Asked, Verdict]) -> Verdict:
    return next(place[key] for place in places if key in place)
