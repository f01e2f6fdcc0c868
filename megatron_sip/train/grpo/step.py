"""One step of GRPO: prompts, rollouts, rewards, advantages, updates.

K  rollouts of a prompt
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_sip.data.lines import Example
from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.engine import Engine
from megatron_sip.objectives import GRPO
from megatron_sip.observability.timers import Timers
from megatron_sip.preference import (
    GroupAdvantages,
    RowShape,
    group_advantages,
    group_rows,
    reward_metrics,
    reward_sums,
    without_missing,
)
from megatron_sip.rollout import GenerationRequest, RolloutEngine, SeedKey
from megatron_sip.rollout.statistics import rollout_scalars, rollout_sums
from megatron_sip.train.grpo.tasks import Scored, Task
from megatron_sip.types import Candidate, CandidateGroup, IntArray, RowBatch, Sample, StepResult, TrainPass

_NO_SUFFIX: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class GRPOShape:
    """Sizes that every step shares."""

    micro_batch_size: int
    generations: int
    answer_length: int
    pad_multiple: int
    batch_passes: int
    mini_batches: int
    advantage_std: bool
    eod_id: int
    seed: int


@dataclass(frozen=True)
class Answered:
    """Examples with their prompts, rollouts and rewards: this replica's."""

    examples: Sequence[Example]
    prompts: Sequence[IntArray]
    rollouts: Sequence[Sequence[Candidate]]
    scored: Sequence[Scored]


@dataclass(frozen=True)
class StepReport:
    """What a step did; ``answered`` is this replica's, the rest equal on all ranks."""

    scalars: dict[str, float]
    results: Sequence[StepResult]
    """One per update."""
    num_tokens: int
    """Tokens through forward and backward on all replicas, once per pass over the batch; prompts count once."""
    answered: Answered


class GRPOStep:
    """Runs steps with the parts it is given; holds no state of its own."""

    def __init__(
        self,
        *,
        task: Task,
        engine: Engine,
        rollouts: RolloutEngine,
        objective: GRPO,
        context: ParallelContext,
        shape: GRPOShape,
        timers: Timers,
    ) -> None:
        self._task = task
        self._engine = engine
        self._rollouts = rollouts
        self._objective = objective
        self._context = context
        self._shape = shape
        self._timers = timers

    def answer(self, examples: Sequence[Example], seed_step: int, generations: int, learn: bool = True) -> Answered:
        """Lets the model answer and rewards it. Collective over the replica."""
        prompts = [self._task.prompt(example) for example in examples]
        requests = [
            GenerationRequest(
                sample_id=example.sample_id,
                prefix=prompt,
                num_rollouts=generations,
                max_new_tokens=self._shape.answer_length,
                seed_key=SeedKey(self._shape.seed, seed_step),
            )
            for example, prompt in zip(examples, prompts, strict=True)
        ]
        with self._timers("rollout"):
            rollouts = self._rollouts.generate(requests)
        with self._timers("reward"):
            scored = self._task.score(examples, rollouts, learn)
        return Answered(examples, prompts, rollouts, scored)

    def train(self, examples: Sequence[Example], step: int) -> StepReport:
        """Answers this replica's examples and learns from the rewards. ``step``: steps before it."""
        started = time.perf_counter()
        answered = self.answer(examples, step, self._shape.generations)
        seconds = time.perf_counter() - started
        rewards = [scored.rewards for scored in answered.scored]
        advantages = [group_advantages(group, self._shape.advantage_std) for group in rewards]
        scalars = reward_metrics(self._context.sum_over_data_parallel(reward_sums(rewards, advantages)))
        scalars |= measures(answered.scored, self._task.parts, self._context)
        groups = [
            without_missing(CandidateGroup(Sample(example.sample_id, 0, prompt, _NO_SUFFIX), tuple(candidates)), group)
            for example, prompt, candidates, group in zip(
                answered.examples, answered.prompts, answered.rollouts, rewards, strict=True
            )
        ]
        sums = rollout_sums((c for row in answered.rollouts for c in row), self._shape.eod_id)
        scalars |= rollout_scalars(self._context.sum_over_data_parallel(sums), seconds)
        results, num_tokens = self._update(groups, advantages, scalars)
        scalars["params-norm"] = self._engine.parameter_norm()
        return StepReport(scalars, results, num_tokens, answered)

    def _update(
        self, groups: Sequence[CandidateGroup], advantages: Sequence[GroupAdvantages], scalars: dict[str, float]
    ) -> tuple[list[StepResult], int]:
        """All passes over the batch; adds the objective's scalars, means over the updates."""
        with self._timers("train"):
            parts = [part for part in self._parts(groups, advantages) if part]
            # Old log-probs are the trainer's own, at the weights that sampled: before the first update changes them.
            parts = [self._scored(part, scalars) for part in parts]
        results: list[StepResult] = []
        sums: dict[str, list[float]] = {}
        num_tokens = 0.0
        for _ in range(self._shape.batch_passes):
            for batches in parts:
                result, metrics, tokens = self._one_update(batches)
                results.append(result)
                num_tokens += tokens
                for name, value in metrics.items():
                    sums.setdefault(name, []).append(value)
        scalars |= {name: float(np.mean(values)) for name, values in sums.items()}
        scalars["grpo/updates"] = float(len(results))
        return results, round(num_tokens)

    def _one_update(self, batches: tuple[RowBatch, ...]) -> tuple[StepResult, dict[str, float], float]:
        counts = self._context.sum_over_data_parallel(
            {"units": sum(map(self._objective.units, batches)), "tokens": sum(map(_real_tokens, batches))}
        )
        with self._timers("train"):
            self._engine.begin_step()
            self._engine.run(TrainPass("grpo", batches, self._objective, 1.0 / counts["units"]), last=True)
        with self._timers("optimizer"):
            metrics = {name: total / count for name, (total, count) in self._engine.collect_metrics().items() if count}
            result = self._engine.optimizer_step()
            self._rollouts.sync_weights(self._engine.num_updates)
        return result, metrics, counts["tokens"]

    def _parts(
        self, groups: Sequence[CandidateGroup], advantages: Sequence[GroupAdvantages]
    ) -> Iterator[tuple[RowBatch, ...]]:
        """Micro-batches of each mini-batch, without the groups that teach nothing; () if none on any replica does.

        All replicas make as many micro-batches: one with fewer groups adds rows of weight 0.
        """
        shape = RowShape(self._shape.micro_batch_size, self._shape.answer_length, pad_multiple=self._shape.pad_multiple)
        for chosen in np.array_split(np.arange(len(groups)), self._shape.mini_batches):
            taught = [int(index) for index in chosen if advantages[index].weight]
            counts = self._context.gather_over_data_parallel(-(-len(taught) // shape.micro_batch_size))
            if not max(counts):
                yield ()
                continue
            taught = taught or [int(chosen[0])]
            yield group_rows(
                [groups[index] for index in taught],
                shape,
                [advantages[index].values for index in taught],
                [advantages[index].weight for index in taught],
                num_micro_batches=max(counts),
            )

    def _scored(self, batches: tuple[RowBatch, ...], scalars: dict[str, float]) -> tuple[RowBatch, ...]:
        """The batches with old log-probs, and with the reference's if the objective needs them."""
        if self._shape.batch_passes * self._shape.mini_batches > 1:
            old = self._engine.score(batches)
            scalars["grpo/sampler_gap"] = self._sampler_gap(batches, old)
            batches = tuple(replace(b, sampling_log_probs=scores) for b, scores in zip(batches, old, strict=True))
        else:
            # The only update sees the weights that sampled: the objective takes its own log-probs.
            batches = tuple(replace(batch, sampling_log_probs=None) for batch in batches)
        if self._objective.needs_reference:
            scored = self._engine.score(batches, which="reference")
            batches = tuple(replace(b, reference_log_probs=scores) for b, scores in zip(batches, scored, strict=True))
        return batches

    def _sampler_gap(self, batches: Sequence[RowBatch], old: Sequence[torch.Tensor]) -> float:
        """Mean absolute difference between the sampler's and the trainer's log-probs of the same tokens, nats."""
        total = count = 0.0
        for batch, scores in zip(batches, old, strict=True):
            if batch.sampling_log_probs is not None:
                valid = batch.mask > 0
                total += float((batch.sampling_log_probs - scores.cpu())[valid].abs().sum(dtype=torch.float64))
                count += float(valid.sum())
        sums = self._context.sum_over_data_parallel({"total": total, "count": count})
        return sums["total"] / sums["count"] if sums["count"] else float("nan")


def measures(scored: Sequence[Scored], parts: Sequence[str], context: ParallelContext) -> dict[str, float]:
    """``reward/<part>`` and the task's own measures, over all replicas. Collective over data parallel."""
    sums: dict[str, float] = {}

    def add(name: str, total: float, count: float) -> None:
        for key, value in ((f"0 {name}", total), (f"1 {name}", count)):
            sums[key] = sums.get(key, 0.0) + value

    for part in parts:
        add(f"reward/{part}", 0.0, 0.0)
    for one in scored:
        known = one.rewards[np.isfinite(one.rewards)]
        add(f"reward/{one.part}", float(known.sum()), float(len(known)))
        for name, (total, count) in one.measures.items():
            add(name, total, count)
    # A replica may lack a part in its share of a batch: the names that any of them has.
    names = sorted({name for found in context.gather_over_data_parallel(list(sums)) for name in found})
    totals = context.sum_over_data_parallel({name: sums.get(name, 0.0) for name in names})
    return _ratios(totals)


def _ratios(totals: Mapping[str, float]) -> dict[str, float]:
    """What was counted nowhere is left out rather than reported as 0."""
    counts = {name[2:]: count for name, count in totals.items() if name.startswith("1 ") and count}
    return {name: totals[f"0 {name}"] / count for name, count in counts.items()}


def _real_tokens(batch: RowBatch) -> float:
    """Tokens of the rows that teach."""
    taught = batch.weights > 0
    return float((batch.mask.sum(dim=1) * taught).sum() + (batch.prefix_lengths * taught).sum())
