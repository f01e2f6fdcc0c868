"""The first half of a step: draw samples, generate rollouts, hand the groups to the judge.

Nothing of it needs the verdicts, so it may run any number of steps ahead of training (``train.lookahead``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_sip.curriculum import StepPlan
from megatron_sip.data.build import NEXT_TOKEN, SUFFIX
from megatron_sip.data.loader import SampleLoader
from megatron_sip.data.samples import Window
from megatron_sip.distributed import ParallelContext
from megatron_sip.observability.timers import Timers
from megatron_sip.rollout import CandidatePool, GenerationRequest, RolloutEngine, SeedKey, build_group
from megatron_sip.rollout.statistics import rollout_sums
from megatron_sip.train.teacher_link import JudgedGroups, TeacherLink
from megatron_sip.types import Candidate, CandidateGroup, IntArray, Sample

if TYPE_CHECKING:  # it knows prepared steps
    from megatron_sip.train.verdicts import VerdictDesk


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
    """A step whose samples are drawn and whose candidates are with the judge. Groups are this replica's."""

    step: int
    plan: StepPlan
    prepared_at: int
    """Steps done when it was prepared: ``step - prepared_at`` is its distance ahead."""
    first_window: int
    """Position of its first window in the next-token stream, over all replicas."""
    first_sample: int
    """The same in the stream of prefixes and suffixes: those of the suffix, rewrite and rollout streams follow."""
    windows: Sequence[Window]
    suffix_groups: Sequence[CandidateGroup]
    rewrite_groups: Sequence[CandidateGroup]
    groups: Sequence[CandidateGroup]
    judge_ticket: int | None
    judged: JudgedGroups | None = None
    """Verdicts that came with a checkpoint; there is no ticket then."""
    rollout_sums: dict[str, float] = field(default_factory=dict)
    rollout_s: float = 0.0
    """Wall time of generation."""

    @property
    def num_samples(self) -> int:
        """Corpus samples over all replicas."""
        return sum(self.plan.counts.values())


class Preparer:
    """Prepares steps with the parts it is given; holds no state of its own."""

    def __init__(
        self,
        *,
        rollouts: RolloutEngine,
        teacher: TeacherLink,
        verdicts: VerdictDesk,
        loader: SampleLoader,
        context: ParallelContext,
        shape: StepShape,
        pool: CandidatePool,
        needs_judge: bool,
        timers: Timers,
    ) -> None:
        self.rollouts = rollouts
        self._teacher = teacher
        self._verdicts = verdicts
        self._loader = loader
        self._context = context
        self._shape = shape
        self._pool = pool
        self._needs_judge = needs_judge
        self._timers = timers

    def prepare(self, step: int, plan: StepPlan, steps_done: int, save: Callable[[], None]) -> PreparedStep:
        """Draws the step's samples and submits its candidate groups. Collective.

        ``step``: optimizer steps before it; ``steps_done``: those made by now; ``save`` keeps the state before this.

        Raises:
            RunStopped: the run is to end, and the rewriter has not answered; the samples count as drawn.
        """
        consumed = self._loader.consumed
        windows: list[Window] = self._take(NEXT_TOKEN, plan.counts["ntp"])
        suffixes: list[Sample] = self._take(SUFFIX, plan.counts["suffix"])
        rewritten: list[Sample] = self._take(SUFFIX, plan.counts["rewrite"])
        judged: list[Sample] = self._take(SUFFIX, plan.counts["rollout"])
        started = time.perf_counter()
        groups, rewrite_groups, sums = self.build_groups(step, judged, rewritten, save)
        rollout_s = time.perf_counter() - started
        return PreparedStep(
            step=step,
            plan=plan,
            prepared_at=steps_done,
            first_window=consumed.get(NEXT_TOKEN, 0),
            first_sample=consumed.get(SUFFIX, 0),
            windows=windows,
            suffix_groups=only_suffixes(suffixes),
            rewrite_groups=rewrite_groups,
            groups=groups,
            judge_ticket=self.submit(groups, step),
            rollout_sums=sums,
            rollout_s=rollout_s,
        )

    def submit(self, groups: Sequence[CandidateGroup], step: int, learn: bool = True) -> int | None:
        """Hands a step's groups to the judge, if the run has use for verdicts."""
        return self._teacher.submit_groups(groups, learn, step) if groups and self._needs_judge else None

    def build_groups(
        self,
        step: int,
        judged: Sequence[Sample],
        rewritten: Sequence[Sample] = (),
        save: Callable[[], None] | None = None,
    ) -> tuple[list[CandidateGroup], list[CandidateGroup], dict[str, float]]:
        """(groups of the judged samples, groups with a rewrite alone, sums of rollout statistics).

        The rewriter works while the policy generates. With ``save`` training may pause, or RunStopped end
        the wait for it.
        """
        asked = [*rewritten, *(judged if self._pool.rewrite else ())]
        ticket = self._teacher.submit_rewrites(asked, step) if asked else None
        rollouts = self._generate(step, judged)
        rewrites = self._collect_rewrites(ticket, asked, step, save) if ticket is not None else ()
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

    def _collect_rewrites(
        self, ticket: int, samples: Sequence[Sample], step: int, save: Callable[[], None] | None
    ) -> Sequence[IntArray | None]:
        if save is None:
            return self._teacher.collect_rewrites(ticket, samples).tokens
        return self._verdicts.collect_rewrites(ticket, samples, step, save).tokens

    def _take(self, stream: str, count: int) -> list[Any]:
        if not count:
            return []
        return self._loader.take(stream, count, self._context.dp_rank, self._context.dp_size)

    def _generate(self, step: int, samples: Sequence[Sample]) -> list[list[Candidate]]:
        if not self._pool.num_rollouts:
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
            return self.rollouts.generate(requests)


def only_suffixes(samples: Sequence[Sample]) -> list[CandidateGroup]:
    """Groups of the suffix stream."""
    return [build_group(sample, _ONLY_SUFFIX) for sample in samples]


_ONLY_SUFFIX = CandidatePool(suffix=True, rewrite=False, num_rollouts=0)
_ONLY_REWRITE = CandidatePool(suffix=False, rewrite=True, num_rollouts=0)
