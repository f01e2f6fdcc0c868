"""A recorded run again, with no judge at all: verdicts and rewrites come from its ledger (``--replay-judgments``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sip.errors import ConfigurationError, JudgeError
from megatron_sip.teacher.interfaces import (
    Judge,
    JudgeGroup,
    JudgeIdentity,
    Question,
    RecordableRewriter,
    Rewrite,
    RewriteItem,
    Rewriter,
    Verdict,
)
from megatron_sip.teacher.ledger import REWRITER, Archive, Asked, Context, Recorded
from megatron_sip.teacher.overuse import History
from megatron_sip.teacher.quality import QualityRecipe, ngram_identity, ngram_prompt_hash
from megatron_sip.teacher.sources import Given, asked_of, rewrite_key, rewrite_of

_REMEMBERED = 500_000
"""Votes: some steps of the paper's size on one replica."""


class Replay:
    """The verdicts of a recorded run, failures included. Nobody is asked; latencies are the recorded ones."""

    def __init__(self, archive: Archive, replica: int = 0) -> None:
        """``replica``: where several replicas asked the same question, its own record counts."""
        self._archive = archive
        self._replica = replica
        self._failed: Counter[str] = Counter()
        """Per vote of a group in a step, how many of its recorded failures were met."""
        self._answered: dict[int, None] = {}
        """Votes that were answered lately, the oldest first."""

    async def ask(self, judge: Judge, questions: Sequence[Question], context: Context) -> list[Given]:
        identity, asked = judge.identity(), asked_of(judge, questions)
        recorded = self._archive.find(judge.criterion, identity, set(asked))
        given: dict[Asked, Verdict] = {}
        for key, question in zip(asked, questions, strict=True):
            if key in given:
                continue
            verdict = self.next_of(judge.criterion, key, recorded.get(key, ()), context.step, context.sample_id)
            if verdict is None:
                candidates = " and ".join(map(str, question.options))
                what = f"{judge.criterion} of sample {context.sample_id}, candidate {candidates}, vote {question.vote}"
                raise JudgeError(self._not_found(judge.criterion, identity, what))
            given[key] = verdict
        calls = {key for key in given if not self._answered_before((judge.criterion, identity, key), given[key])}
        answers = []
        for key in asked:
            answers.append(Given(given[key], cached=key not in calls))
            calls.discard(key)
        return answers

    def _answered_before(self, vote: tuple[str, JudgeIdentity, Asked], verdict: Verdict) -> bool:
        """Whether the recorded run took it from its ledger: what counts as a call decides when training pauses."""
        if verdict.failure:
            return False
        name = hash(vote)
        if name in self._answered:
            return True
        self._answered[name] = None
        if len(self._answered) > _REMEMBERED:
            del self._answered[next(iter(self._answered))]
        return False

    async def rewrite(self, rewriter: Rewriter, items: Sequence[RewriteItem], step: int | None) -> Sequence[Rewrite]:
        """Rules are run again; what a model wrote was recorded."""
        if not isinstance(rewriter, RecordableRewriter):
            return await rewriter.rewrite(items)
        return [self._rewrite(rewriter, item, step) for item in items]

    def _rewrite(self, rewriter: RecordableRewriter, item: RewriteItem, step: int | None) -> Rewrite:
        identity, key = rewriter.identity(), rewrite_key(rewriter, item)
        recorded = self._archive.find(REWRITER, identity, {key}, with_raw=True)
        verdict = self.next_of(REWRITER, key, recorded.get(key, ()), step, item.sample_id)
        if verdict is None:
            raise JudgeError(self._not_found(REWRITER, identity, f"the rewrite of sample {item.sample_id}"))
        return rewrite_of(verdict, item)

    def next_of(
        self, criterion: str, key: Asked, recorded: Sequence[Recorded], step: int | None, sample_id: int
    ) -> Verdict | None:
        """What the recorded run met at this point: the failures of this group in this step one after another, then the
        vote's answer; None if it met no more.

        Failures of other steps and groups do not count, so that a replay may begin at any checkpoint.
        """
        own = [entry.verdict for entry in recorded if (entry.step, entry.sample_id) == (step, sample_id)]
        failures = [verdict for verdict in own if verdict.failure]
        name = f"{criterion} {key.prompt.hex()} {key.vote} {step} {sample_id}"
        if self._failed[name] < len(failures):
            self._failed[name] += 1
            return failures[self._failed[name] - 1]
        # Replicas do not know of each other: each may have an answer of its own.
        nearest = sorted(recorded, key=lambda entry: entry.replica != self._replica)
        answers = own + [entry.verdict for entry in nearest]
        return next((verdict for verdict in answers if not verdict.failure), None)

    def _not_found(self, criterion: str, identity: JudgeIdentity, what: str) -> str:
        if identity not in self._archive.identities(criterion):
            others = "; ".join(_described(other) for other in self._archive.identities(criterion)[:3]) or "none"
            why = f"it knows no {_described(identity)}, but {others}; give the judge options of the recorded run"
        else:
            why = "this run asks what the recorded one did not; give its data, seed, layout and options"
        return f"replay-judgments {self._archive.base} lacks {what}: {why}, or leave out --replay-judgments"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Steps whose verdicts a checkpoint lacks are asked from their beginning."""

    def close(self) -> None:
        self._archive.close()


class ReplayedQualityJudge:
    """Stands for the embedded n-gram judge without its model: it knows what would be asked, and under which name.

    The judge's running statistics are named by the rollouts that they have seen; the name is all that is kept of them.
    """

    criterion = "quality"

    def __init__(self, archive: Archive, recipe: QualityRecipe, model: str | None = None) -> None:
        """``model``: fingerprint of the judge's model, needed only where the ledger knows several with this recipe.

        Raises ConfigurationError if it knows none, or several and no model is given.
        """
        known = archive.identities(self.criterion)
        of_recipe = {
            (identity.name, identity.model.partition("@")[0])
            for identity in known
            if identity.model.partition("@")[0].endswith(recipe.fingerprint())
        }
        fitting = {pair for pair in of_recipe if model is None or pair[1].startswith(model)}
        if len(fitting) != 1:
            found = ", ".join(sorted({identity.model.partition("@")[0] for identity in known})[:5]) or "none"
            what = "several embedded quality judges" if fitting else "no embedded quality judge"
            raise ConfigurationError(
                f"replay-judgments {archive.base} knows {what} with these quality settings (models: {found}): give the "
                "recorded run's quality-judge, quality-settings and judge-model"
            )
        self._name, self._model = fitting.pop()
        self._history = History() if recipe.overuse else None

    def identity(self) -> JudgeIdentity:
        return ngram_identity(self._name, self._model, self._history)

    def prompt_hash(self, question: Question) -> str:
        return ngram_prompt_hash(question)

    async def ask(self, questions: Sequence[Question]) -> Sequence[Verdict]:
        raise JudgeError("a replayed judge was asked: its verdicts come from the ledger")

    def observe(self, groups: Sequence[JudgeGroup]) -> None:
        if self._history is not None:
            self._history.observe(groups)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self._history.digest} if self._history is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._history is not None and state:
            self._history.digest = str(state["history"])


def _described(identity: JudgeIdentity) -> str:
    sampling = f" ({identity.sampling})" if identity.sampling else ""
    return f"{identity.name}, model {identity.model}{sampling}"
