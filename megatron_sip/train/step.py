"""One step of Self-Improving Pretraining, in two halves: what can be done before the judge, and what is learned.

``prepare`` draws samples, generates rollouts and hands the groups to the teacher; ``train`` runs the passes that need
no verdict while the teacher works, then the judged pass, then the optimizer (docs/design/architecture.md). Between the
halves lies nothing but a ``PreparedStep``, so that a trainer may prepare several steps ahead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megatron_sip.curriculum import StepPlan
from megatron_sip.data.batches import next_token_batches
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
    pair_rows,
    preference_metrics,
    preference_sums,
    select,
)
from megatron_sip.rollout import CandidatePool, GenerationRequest, RolloutEngine, SeedKey, build_group
from megatron_sip.rollout.statistics import rollout_scalars, rollout_sums
from megatron_sip.teacher.convert import rewriter_sums
from megatron_sip.teacher.http.failures import KINDS, REMOTE_COUNTS
from megatron_sip.train.teacher_link import JudgedGroups, TeacherLink
from megatron_sip.types import (
    Candidate,
    CandidateGroup,
    CandidateKind,
    Objective,
    Preference,
    RowBatch,
    Sample,
    StepResult,
    TrainPass,
)


@dataclass(frozen=True)
class StepShape:
    """Sizes that every step shares."""

    micro_batch_size: int
    """Rows of a next-token micro-batch."""
    rollout_micro_batch_size: int
    """Rows of a micro-batch of the suffix, rewrite and rollout streams."""
    suffix_length: int
    rollout_length: int
    """Tokens of a rollout at most, no more than ``suffix_length``."""
    pad_multiple: int
    masked_eod_id: int | None
    eod_id: int
    seed: int


@dataclass(frozen=True)
class PreparedStep:
    """A step whose samples are drawn and whose candidates are with the judge."""

    step: int
    plan: StepPlan
    windows: Sequence[Window]
    suffix_groups: Sequence[CandidateGroup]
    rewrite_groups: Sequence[CandidateGroup]
    groups: Sequence[CandidateGroup]
    judge_ticket: int | None
    rollout_sums: dict[str, float] = field(default_factory=dict)
    rollout_s: float = 0.0
    """Wall time of generation."""


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
        teacher: TeacherLink,
        loader: SampleLoader,
        context: ParallelContext,
        shape: StepShape,
        pool: CandidatePool,
        preference: PreferenceConfig,
        objective: Objective,
        timers: Timers,
    ) -> None:
        self._engine = engine
        self._rollouts = rollouts
        self._teacher = teacher
        self._loader = loader
        self._context = context
        self._shape = shape
        self._pool = pool
        self._preference = preference
        self._objective = objective
        self._timers = timers

    def prepare(self, step: int, plan: StepPlan) -> PreparedStep:
        """Draws the step's samples and submits its candidate groups. ``step``: optimizer steps before it."""
        windows: list[Window] = self._take("ntp", plan.counts["ntp"])
        suffixes: list[Sample] = self._take("sip", plan.counts["suffix"])
        rewritten: list[Sample] = self._take("sip", plan.counts["rewrite"])
        judged: list[Sample] = self._take("sip", plan.counts["rollout"])
        started = time.perf_counter()
        groups, rewrite_groups, sums = self.build_groups(step, judged, rewritten)
        rollout_s = time.perf_counter() - started
        ticket = None
        if groups and self._preference.needs_judge:
            ticket = self._teacher.submit_groups(groups, step=step)
        return PreparedStep(
            step=step,
            plan=plan,
            windows=windows,
            suffix_groups=[build_group(sample, _ONLY_SUFFIX) for sample in suffixes],
            rewrite_groups=rewrite_groups,
            groups=groups,
            judge_ticket=ticket,
            rollout_sums=sums,
            rollout_s=rollout_s,
        )

    def build_groups(
        self, step: int, judged: Sequence[Sample], rewritten: Sequence[Sample] = ()
    ) -> tuple[list[CandidateGroup], list[CandidateGroup], dict[str, float]]:
        """(groups of the judged samples, groups with a rewrite alone, sums of rollout statistics).

        The rewriter works while the policy generates.
        """
        asked = [*rewritten, *(judged if self._pool.rewrite else ())]
        ticket = self._teacher.submit_rewrites(asked, step) if asked else None
        rollouts = self._generate(step, judged)
        rewrites = self._teacher.collect_rewrites(ticket, asked) if ticket is not None else []
        own, pooled = rewrites[: len(rewritten)], rewrites[len(rewritten) :]
        rewrite_groups = [
            build_group(sample, _ONLY_REWRITE, rewrite=rewrite) for sample, rewrite in zip(rewritten, own, strict=True)
        ]
        groups = [
            build_group(sample, self._pool, rollouts[i], pooled[i] if self._pool.rewrite else None)
            for i, sample in enumerate(judged)
        ]
        sums = rollout_sums((rollout for row in rollouts for rollout in row), self._shape.eod_id)
        return groups, rewrite_groups, sums

    def train(self, prepared: PreparedStep) -> StepOutcome:
        """Trains on a prepared step and updates the weights."""
        plan, scalars, tokens = prepared.plan, dict[str, float](), 0.0
        preferences: Sequence[Preference] = ()
        health = PolicyHealth()
        self._engine.begin_step()
        unjudged = self._unjudged_passes(prepared)
        with self._timers("train"):
            for index, (stream, batches, objective) in enumerate(unjudged):
                last = index + 1 == len(unjudged) and not prepared.groups
                tokens += self._run(stream, batches, objective, plan, last)
        if prepared.groups:
            preferences = self._preferences(prepared, scalars)
            with self._timers("train"):
                batches = self._preference_batches(preferences)
                kl = float("nan")
                if self._engine.has_reference:
                    batches = self._with_reference(batches)
                    kl = _kl_to_reference(preferences, batches)
                tokens += self._run("rollout", batches, self._objective, plan, last=True)
            health = self._health(prepared, kl)
        with self._timers("optimizer"):
            scalars.update(_ratios(self._engine.collect_metrics()))
            result = self._engine.optimizer_step()
            self._rollouts.sync_weights(self._engine.num_updates)
        scalars.update(self._rollout_scalars(prepared))
        scalars.update(self._rewriter_scalars(prepared))
        scalars.update(self._policy_scalars(prepared))
        return StepOutcome(result, scalars, round(tokens), preferences, health)

    def _policy_scalars(self, prepared: PreparedStep) -> dict[str, float]:
        versions = [c.weight_version for group in prepared.groups for c in group.candidates if c.weight_version >= 0]
        scalars = {"params-norm": self._engine.parameter_norm()}
        if versions:
            # The optimizer has stepped since: what the batch was trained with was one version older.
            scalars["policy/staleness_steps"] = max(0.0, float(self._engine.num_updates - 1 - np.mean(versions)))
        return scalars

    def _preferences(self, prepared: PreparedStep, scalars: dict[str, float]) -> Sequence[Preference]:
        """Waits for the verdicts; adds the judge's and the preferences' scalars."""
        judgments = None
        if prepared.judge_ticket is not None:
            judged = self._teacher.collect_groups(prepared.judge_ticket)
            judgments = judged.judgments
            scalars.update(self.judge_scalars(judged))
        preferences = select(prepared.groups, judgments, self._preference)
        sums = self._context.sum_over_data_parallel(preference_sums(preferences))
        scalars.update(preference_metrics(sums))
        return preferences

    def judge_scalars(self, judged: JudgedGroups) -> dict[str, float]:
        """What the log says of a submission, over all replicas. Collective over data parallel."""
        sums = self._context.sum_over_data_parallel(judged.counts)
        latencies = [x for part in self._context.gather_over_data_parallel(judged.latencies_s) for x in part]
        waits = self._context.gather_over_data_parallel(judged.exposed_wait_s)
        scalars = {
            "judge/calls": sums["calls"],
            "judge/cached": sums["cached"],
            "judge/parse_fail_rate": sums["failures"] / max(sums["calls"], 1.0),
            "judge/comparisons_per_prompt": sums["comparisons"] / max(sums["groups"], 1.0),
            "judge/exposed_wait_s": max(waits),
        }
        if sums["remote_requests"]:
            scalars.update({f"judge/{name}": sums[f"remote_{name}"] for name in REMOTE_COUNTS})
            scalars.update({f"judge/failures_{kind}": sums[f"failures_{kind}"] for kind in KINDS})
        if sums["both_orders"]:
            scalars["judge/position_flip_rate"] = sums["flips"] / sums["both_orders"]
        if latencies:
            scalars["judge/latency_p50_s"] = float(np.quantile(latencies, 0.5))
            scalars["judge/latency_p99_s"] = float(np.quantile(latencies, 0.99))
        return scalars

    def _take(self, stream: str, count: int) -> list[Any]:
        if not count:
            return []
        return self._loader.take(stream, count, self._context.dp_rank, self._context.dp_size)

    def _generate(self, step: int, samples: Sequence[Sample]) -> list[list[Candidate]]:
        if not samples or not self._pool.num_rollouts:
            return [[] for _ in samples]
        requests = [
            GenerationRequest(
                sample_id=sample.sample_id,
                prefix=sample.prefix,
                num_rollouts=self._pool.num_rollouts,
                max_new_tokens=self._shape.rollout_length,
                seed_key=SeedKey(self._shape.seed, step),
            )
            for sample in samples
        ]
        with self._timers("rollout"):
            return self._rollouts.generate(requests)

    def _unjudged_passes(self, prepared: PreparedStep) -> list[tuple[str, tuple[RowBatch, ...], Objective]]:
        passes: list[tuple[str, tuple[RowBatch, ...], Objective]] = []
        if prepared.windows:
            batches = next_token_batches(
                prepared.windows,
                self._shape.micro_batch_size,
                pad_multiple=self._shape.pad_multiple,
                masked_eod_id=self._shape.masked_eod_id,
            )
            passes.append(("ntp", batches, NextToken()))
        for name, groups in (("suffix", prepared.suffix_groups), ("rewrite", prepared.rewrite_groups)):
            if groups:
                picks = [0 if group.candidates else None for group in groups]
                passes.append((name, candidate_rows(groups, picks, self._row_shape()), SuffixNLL(name)))
        return passes

    def _row_shape(self) -> RowShape:
        return RowShape(
            micro_batch_size=self._shape.rollout_micro_batch_size,
            candidate_block=self._shape.suffix_length,
            pad_multiple=self._shape.pad_multiple,
        )

    def _preference_batches(self, preferences: Sequence[Preference]) -> tuple[RowBatch, ...]:
        rows = pair_rows if self._preference.num_candidates == 2 else chosen_rows
        return rows(preferences, self._row_shape())

    def _with_reference(self, batches: Sequence[RowBatch]) -> tuple[RowBatch, ...]:
        log_probs = self._engine.score(batches, which="reference")
        return tuple(
            replace(batch, reference_log_probs=scored) for batch, scored in zip(batches, log_probs, strict=True)
        )

    def _run(
        self,
        stream: str,
        batches: tuple[RowBatch, ...],
        objective: Objective,
        plan: StepPlan,
        last: bool,
    ) -> float:
        """Runs one pass; returns the real tokens of all replicas."""
        counts = self._context.sum_over_data_parallel(
            {"units": sum(objective.units(batch) for batch in batches), "tokens": sum(map(_real_tokens, batches))}
        )
        # A pass without any unit still runs, with scale 0: every rank makes the same calls.
        scale = plan.weights[stream] / counts["units"] if counts["units"] else 0.0
        self._engine.run(TrainPass(stream, batches, objective, scale), last=last)
        return counts["tokens"]

    def _rewriter_scalars(self, prepared: PreparedStep) -> dict[str, float]:
        groups = [*prepared.rewrite_groups, *(prepared.groups if self._pool.rewrite else ())]
        if not groups:
            return {}
        rewrites = [next((c for c in g.candidates if c.kind is CandidateKind.REWRITE), None) for g in groups]
        own = rewriter_sums([group.sample for group in groups], rewrites)
        flat = {f"{part} {name}": pair[part] for name, pair in own.items() for part in (0, 1)}
        sums = self._context.sum_over_data_parallel(flat)
        return _ratios({name: (sums[f"0 {name}"], sums[f"1 {name}"]) for name in own})

    def _rollout_scalars(self, prepared: PreparedStep) -> dict[str, float]:
        if not prepared.groups or not self._pool.num_rollouts:
            return {}
        sums = self._context.sum_over_data_parallel(prepared.rollout_sums)
        return rollout_scalars(sums, prepared.rollout_s)

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


def _ratios(metrics: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """What was counted nowhere is left out rather than reported as 0."""
    return {name: total / count for name, (total, count) in metrics.items() if count}


def _kl_to_reference(preferences: Sequence[Preference], batches: Sequence[RowBatch]) -> float:
    """Nats per token: mean of (sampling - reference) log-prob over the rollouts that were chosen or rejected.

    An estimate of KL(policy || reference), unbiased if the judge's choice has nothing to do with the ratio; NaN if no
    rollout was chosen or rejected.
    """
    total, count = 0.0, 0
    block = batches[0].layout.candidate_block
    references = torch.cat([batch.reference_log_probs for batch in batches if batch.reference_log_probs is not None])
    references = references.double().cpu()
    for row, preference in enumerate(preferences):
        picks = (preference.chosen, preference.rejected)
        for place, pick in enumerate(pick for pick in picks if pick is not None and preference.weight):
            sampled = preference.group.candidates[pick].sampling_log_probs
            if sampled is not None:
                reference = references[row, place * block : place * block + len(sampled)]
                total += float(sampled.sum(dtype=np.float64)) - float(reference.sum())
                count += len(sampled)
    return total / count if count else math.nan


_ONLY_SUFFIX = CandidatePool(suffix=True, rewrite=False, num_rollouts=0)
_ONLY_REWRITE = CandidatePool(suffix=False, rewrite=True, num_rollouts=0)
