"""The second half of a step: what is learned from samples that ``train.prepare`` drew.

The passes that need no verdict run while the teacher works, then the judged pass, then the optimizer
(docs/design/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_sip.data.batches import next_token_batches
from megatron_sip.data.build import NEXT_TOKEN
from megatron_sip.data.loader import SampleLoader
from megatron_sip.data.samples import Window
from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.engine import Engine
from megatron_sip.objectives import NextToken, SuffixNLL
from megatron_sip.observability.alarms import PolicyHealth, measure_health
from megatron_sip.observability.timers import Timers
from megatron_sip.preference import (
    PreferenceConfig,
    RowShape,
    candidate_rows,
    chosen_rows,
    longest_first,
    pair_rows,
    preference_metrics,
    preference_sums,
    select,
)
from megatron_sip.rollout import CandidatePool, RolloutEngine
from megatron_sip.train.fill import WINDOWS, FillRule
from megatron_sip.train.prepare import PreparedStep, StepShape, only_suffixes
from megatron_sip.train.references import (
    CandidateScores,
    from_scores,
    kl_to_reference,
    score_candidates,
    with_reference,
)
from megatron_sip.train.scalars import candidate_scalars, judge_scalars, ratios, staleness_scalars
from megatron_sip.train.verdicts import VerdictDesk
from megatron_sip.types import Objective, Preference, RowBatch, StepResult, TrainPass


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, equal on all ranks but for ``preferences``, which are this replica's."""

    result: StepResult
    scalars: dict[str, float]
    num_tokens: int
    """Real tokens through forward and backward on all replicas; a row's prefix counts once."""
    preferences: Sequence[Preference]
    health: PolicyHealth


class StepRunner:
    """Runs steps with the parts it is given; holds no state of its own."""

    def __init__(
        self,
        *,
        engine: Engine,
        rollouts: RolloutEngine,
        verdicts: VerdictDesk,
        loader: SampleLoader,
        context: ParallelContext,
        shape: StepShape,
        pool: CandidatePool,
        preference: PreferenceConfig,
        objective: Objective,
        fill: FillRule,
        early_reference: bool,
        timers: Timers,
    ) -> None:
        """``early_reference``: score all candidates under the reference while the judge works."""
        self._engine = engine
        self._rollouts = rollouts
        self.verdicts = verdicts
        self._loader = loader
        self._context = context
        self._shape = shape
        self._pool = pool
        self._preference = preference
        self._objective = objective
        self._fill_rule = fill
        self._early_reference = early_reference and engine.has_reference
        self._timers = timers

    def train(self, prepared: PreparedStep, save: Callable[[], None]) -> StepOutcome:
        """Trains on a prepared step and updates the weights. ``save`` keeps the state that was before it.

        Raises:
            RunStopped: the run is to end, and verdicts have not come; the weights are as before.
        """
        scalars = staleness_scalars(prepared, self._engine.num_updates)
        tokens, health = 0.0, PolicyHealth()
        preferences: Sequence[Preference] = ()
        self._engine.begin_step()
        unjudged = self._unjudged_passes(prepared)
        with self._timers("train"):
            for index, (stream, batches, objective) in enumerate(unjudged):
                last = index + 1 == len(unjudged) and not prepared.groups
                weight = prepared.plan.weights[stream]
                tokens += self._run(stream, batches, objective, weight, last)
        if prepared.groups:
            early = self._score_early(prepared)
            tokens += self._fill(prepared, scalars)
            preferences = self._preferences(prepared, scalars, save)
            batches, kl = self._preference_batches(preferences, early)
            with self._timers("train"):
                weight = prepared.plan.weights["rollout"]
                tokens += self._run("rollout", batches, self._objective, weight, last=True)
            health = self._health(prepared, kl)
        with self._timers("optimizer"):
            scalars.update(ratios(self._engine.collect_metrics()))
            result = self._engine.optimizer_step()
            self._engine.finish_parameter_sync()
        scalars.update(candidate_scalars(self._context, prepared, self._pool))
        scalars["params-norm"] = self._engine.parameter_norm()
        return StepOutcome(result, scalars, round(tokens), preferences, health)

    def sync_rollouts(self) -> None:
        """Rollouts come from the present weights from now on.

        Raises:
            RolloutError: servers of rollouts do not take them; on all ranks.
        """
        with self._timers("optimizer"):
            self._engine.finish_parameter_sync()
            self._rollouts.sync_weights(self._engine.num_updates)

    def _preferences(
        self, prepared: PreparedStep, scalars: dict[str, float], save: Callable[[], None]
    ) -> Sequence[Preference]:
        """Waits for the verdicts; adds the judge's and the preferences' scalars."""
        judgments = None
        if self._preference.needs_judge:
            verdicts = self.verdicts.collect(prepared, save)
            judgments = verdicts.judged.judgments
            scalars.update(judge_scalars(self._context, verdicts))
        preferences = select(prepared.groups, judgments, self._preference)
        sums = self._context.sum_over_data_parallel(preference_sums(preferences))
        scalars.update(preference_metrics(sums))
        return preferences

    def _unjudged_passes(self, prepared: PreparedStep) -> list[tuple[str, tuple[RowBatch, ...], Objective]]:
        passes: list[tuple[str, tuple[RowBatch, ...], Objective]] = []
        if prepared.drawn.windows:
            passes.append(("ntp", self._window_batches(prepared.drawn.windows), NextToken()))
        for name, groups in (("suffix", only_suffixes(prepared.drawn.suffixes)), ("rewrite", prepared.rewrite_groups)):
            if groups:
                groups = [groups[index] for index in longest_first([group.sample.prefix for group in groups])]
                picks = [0 if group.candidates else None for group in groups]
                passes.append((name, candidate_rows(groups, picks, self._row_shape()), SuffixNLL(name)))
        return passes

    def _window_batches(self, windows: Sequence[Window]) -> tuple[RowBatch, ...]:
        return next_token_batches(
            windows,
            self._shape.micro_batch_size,
            pad_multiple=self._shape.pad_multiple,
            masked_eod_id=self._shape.masked_eod_id,
        )

    def _fill(self, prepared: PreparedStep, scalars: dict[str, float]) -> float:
        """Next-token rounds while verdicts are late; returns their tokens.

        A window counts in the gradient as much as one of the step's own, or as one of a batch full of windows in a
        step that has none: the planned windows' loss does not change by how late a judge was.
        """
        if not self._preference.needs_judge:
            return 0.0
        rule, tokens, windows = self._fill_rule, 0.0, 0
        while rule.more(prepared.step, windows, partial(self.verdicts.ready, prepared)):
            own = self._loader.take(NEXT_TOKEN, rule.round_windows, self._context.dp_rank, self._context.dp_size)
            windows += rule.round_windows
            planned = prepared.plan.counts["ntp"] or prepared.num_samples
            share = prepared.plan.weights["ntp"] * rule.round_windows / planned
            with self._timers("fill"):
                tokens += self._run("fill", self._window_batches(own), NextToken(), share, last=False)
        if rule.max_windows:
            scalars[WINDOWS] = float(windows)
        return tokens

    def _row_shape(self) -> RowShape:
        return RowShape(
            micro_batch_size=self._shape.rollout_micro_batch_size,
            candidate_block=self._shape.suffix_length,
            pad_multiple=self._shape.pad_multiple,
        )

    def _score_early(self, prepared: PreparedStep) -> CandidateScores | None:
        if not self._early_reference:
            return None
        with self._timers("reference"):
            return score_candidates(
                self._engine,
                prepared.groups,
                self._row_shape(),
                self._pool.num_candidates,
                self._preference.num_candidates,
            )

    def _preference_batches(
        self, preferences: Sequence[Preference], early: CandidateScores | None
    ) -> tuple[tuple[RowBatch, ...], float]:
        """(batches with the reference's log-probs where there is one, KL to the reference)."""
        # Here and not where samples are drawn: checkpoints and replicas share a step out by the order of drawing.
        order = longest_first([preference.group.sample.prefix for preference in preferences])
        preferences = [preferences[index] for index in order]
        early = None if early is None else [early[index] for index in order]
        rows = pair_rows if self._preference.num_candidates == 2 else chosen_rows
        batches = rows(preferences, self._row_shape())
        if not self._engine.has_reference:
            return batches, float("nan")
        with self._timers("reference"):
            if early is None:
                scored = with_reference(self._engine, batches)
            else:
                scored = from_scores(batches, preferences, early)
        return scored, kl_to_reference(preferences, scored)

    def _run(
        self, stream: str, batches: tuple[RowBatch, ...], objective: Objective, weight: float, last: bool
    ) -> float:
        """Runs one pass; returns the real tokens of all replicas."""
        counts = self._context.sum_over_data_parallel(
            {"units": sum(objective.units(batch) for batch in batches), "tokens": sum(map(_real_tokens, batches))}
        )
        # A pass without any unit still runs, with scale 0: every rank makes the same calls.
        scale = weight / counts["units"] if counts["units"] else 0.0
        self._engine.run(TrainPass(stream, batches, objective, scale), last=last)
        return counts["tokens"]

    def _health(self, prepared: PreparedStep, kl_to_reference: float) -> PolicyHealth:
        """Of this replica's rollouts alone: enough to see a policy that goes wrong."""
        if not self._pool.num_rollouts:
            return PolicyHealth(kl_to_reference=kl_to_reference)
        return measure_health(prepared.groups, self._shape.suffix_length, kl_to_reference)


def _real_tokens(batch: RowBatch) -> float:
    """Tokens of rows that teach: prefix plus candidates, or the scored tokens of a next-token row."""
    scored = float((batch.mask.sum(dim=1) * (batch.weights > 0)).sum())
    if not batch.layout.num_candidates:
        return scored
    return scored + float((batch.prefix_lengths * (batch.weights > 0)).sum())
