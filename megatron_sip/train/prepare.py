"""The first half of a step: draw samples, ask for rewrites, generate rollouts, hand the groups to the judge.

Nothing of it needs the verdicts, so it may run any number of steps ahead of training (``train.lookahead``); and samples
and their rewrites need not even the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
class DrawnStep:
    """A step's plan and this replica's samples, whose rewrites have been asked for."""

    step: int
    plan: StepPlan
    first_window: int
    """Position of its first window in the next-token stream, over all replicas."""
    first_sample: int
    """The same in the stream of prefixes and suffixes: those of the suffix, rewrite and rollout streams follow."""
    windows: Sequence[Window]
    suffixes: Sequence[Sample]
    rewritten: Sequence[Sample]
    judged: Sequence[Sample]
    rewrite_ticket: int | None = None

    @property
    def num_samples(self) -> int:
        """Corpus samples over all replicas."""
        return sum(self.plan.counts.values())


@dataclass(frozen=True)
class PreparedStep:
    """A step whose candidates are with the judge. Groups are this replica's."""

    drawn: DrawnStep
    prepared_at: int
    """Steps done when it was prepared: ``step - prepared_at`` is its distance ahead."""
    rewrite_groups: Sequence[CandidateGroup]
    groups: Sequence[CandidateGroup]
    judge_ticket: int | None
    judged: JudgedGroups | None = None
    """Verdicts that came with a checkpoint; there is no ticket then."""
    rollout_sums: dict[str, float] = field(default_factory=dict)
    rollout_s: float = 0.0
    """Wall time of generation, and of the wait for rewrites after it."""
    rewrite_wait_s: float | None = None
    """Of it the wait for rewrites; None where none were asked for since the run began or went on."""

    @property
    def step(self) -> int:
        return self.drawn.step

    @property
    def plan(self) -> StepPlan:
        return self.drawn.plan

    @property
    def num_samples(self) -> int:
        """Corpus samples over all replicas."""
        return self.drawn.num_samples


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

    def draw(self, step: int, plan: StepPlan) -> DrawnStep:
        """Draws the step's samples, which thereby count as consumed, and asks for their rewrites.

        ``step``: optimizer steps before it.
        """
        consumed, counts = self._loader.consumed, plan.counts
        return self.with_rewrites(
            DrawnStep(
                step=step,
                plan=plan,
                first_window=consumed.get(NEXT_TOKEN, 0),
                first_sample=consumed.get(SUFFIX, 0),
                windows=self._take(NEXT_TOKEN, counts["ntp"]),
                suffixes=self._take(SUFFIX, counts["suffix"]),
                rewritten=self._take(SUFFIX, counts["rewrite"]),
                judged=self._take(SUFFIX, counts["rollout"]),
            )
        )

    def with_rewrites(self, drawn: DrawnStep) -> DrawnStep:
        """Asks for the rewrites of its samples, if it has use for any."""
        asked = self._asked(drawn.rewritten, drawn.judged)
        return replace(drawn, rewrite_ticket=self._teacher.submit_rewrites(asked, drawn.step) if asked else None)

    def prepare(self, drawn: DrawnStep, steps_done: int, save: Callable[[], None]) -> PreparedStep:
        """Generates the step's rollouts and submits its candidate groups. Collective.

        ``steps_done``: optimizer steps made by now; ``save`` keeps the state before this, should training pause.

        Raises:
            RunStopped: the run is to end, and the rewriter has not answered.
        """
        started = time.perf_counter()
        rollouts = self._generate(drawn.step, drawn.judged)
        rewrites: Sequence[IntArray | None] = ()
        waited_s = None
        if drawn.rewrite_ticket is not None:
            asked, before = self._asked(drawn.rewritten, drawn.judged), time.perf_counter()
            rewrites = self._verdicts.collect_rewrites(drawn.rewrite_ticket, asked, drawn.step, save).tokens
            waited_s = time.perf_counter() - before
        rollout_s = time.perf_counter() - started
        own, pooled = rewrites[: len(drawn.rewritten)], rewrites[len(drawn.rewritten) :]
        groups = self._groups(drawn.judged, rollouts, pooled)
        return PreparedStep(
            drawn=drawn,
            prepared_at=steps_done,
            rewrite_groups=[
                build_group(sample, _ONLY_REWRITE, rewrite=rewrite)
                for sample, rewrite in zip(drawn.rewritten, own, strict=True)
            ],
            groups=groups,
            judge_ticket=self.submit(groups, drawn.step),
            rollout_sums=self._sums(rollouts),
            rollout_s=rollout_s,
            rewrite_wait_s=waited_s,
        )

    def submit(self, groups: Sequence[CandidateGroup], step: int, learn: bool = True) -> int | None:
        """Hands a step's groups to the judge, if the run has use for verdicts."""
        return self._teacher.submit_groups(groups, learn, step) if groups and self._needs_judge else None

    def build_groups(self, step: int, samples: Sequence[Sample]) -> list[CandidateGroup]:
        """Candidates of samples that no step has drawn, for a probe. The rewriter works while the policy generates."""
        asked = self._asked((), samples)
        ticket = self._teacher.submit_rewrites(asked, step) if asked else None
        rollouts = self._generate(step, samples)
        rewrites = self._teacher.collect_rewrites(ticket, asked).tokens if ticket is not None else ()
        return self._groups(samples, rollouts, rewrites)

    def _asked(self, rewritten: Sequence[Sample], judged: Sequence[Sample]) -> list[Sample]:
        """Samples whose rewrites are asked for, in the order in which they come back."""
        return [*rewritten, *(judged if self._pool.rewrite else ())]

    def _groups(
        self, samples: Sequence[Sample], rollouts: Sequence[list[Candidate]], rewrites: Sequence[IntArray | None]
    ) -> list[CandidateGroup]:
        return [
            build_group(sample, self._pool, rollouts[i], rewrites[i] if self._pool.rewrite else None)
            for i, sample in enumerate(samples)
        ]

    def _sums(self, rollouts: Sequence[list[Candidate]]) -> dict[str, float]:
        return rollout_sums((rollout for row in rollouts for rollout in row), self._shape.eod_id)

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
