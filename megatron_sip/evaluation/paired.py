"""Continues the same prefixes with two policies and has a judge compare the continuations pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sip.evaluation.win_rate import outcomes
from megatron_sip.rollout import GenerationRequest, RolloutEngine, SeedKey
from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.types import Candidate, CandidateGroup, FloatArray, Judgment, Sample

Judge = Callable[[Sequence[CandidateGroup]], Sequence[Judgment]]
"""Judges groups; one judgment per group, in order."""

EVALUATION_STEP = 1 << 41
"""Stands for the training step in the evaluation's random numbers, so that they are none of training's."""


@dataclass(frozen=True)
class Decoding:
    """How continuations are drawn."""

    temperature: float
    """0 decodes greedily."""
    max_new_tokens: int
    seed: int
    num_seeds: int = 1
    """Continuations per prefix; greedy decoding has one."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_continuations(self) -> int:
        return 1 if self.greedy else self.num_seeds

    @property
    def name(self) -> str:
        """``greedy`` or ``T=0.8``."""
        return "greedy" if self.greedy else f"T={self.temperature:g}"


@dataclass(frozen=True)
class PairedVerdicts:
    """What a judge said of n prefixes with s pairs each; NaN where it said nothing."""

    outcomes: FloatArray
    """[n, s]; 1 where the policy won, 1/2 for a tie, 0 where the baseline won."""
    policy_criteria: Mapping[str, FloatArray]
    """Scores [n, s] of the policy's continuations per criterion ("quality", "safety", "factuality")."""
    baseline_criteria: Mapping[str, FloatArray]

    def criterion_means(self) -> dict[str, tuple[float, float]]:
        """Mean score of policy and baseline per criterion, over those that have one."""
        return {
            name: (_mean(scores), _mean(self.baseline_criteria[name])) for name, scores in self.policy_criteria.items()
        }


def continue_prefixes(engine: RolloutEngine, samples: Sequence[Sample], decoding: Decoding) -> list[list[Candidate]]:
    """Continuations [n][s] of the samples' prefixes. Two policies draw with the same random numbers, which makes their
    comparison steadier. Collective over a replica, as ``RolloutEngine.generate`` is."""
    requests = [
        GenerationRequest(
            sample_id=sample.sample_id,
            prefix=sample.prefix,
            num_rollouts=decoding.num_continuations,
            max_new_tokens=decoding.max_new_tokens,
            seed_key=SeedKey(decoding.seed, EVALUATION_STEP),
            greedy=decoding.greedy,
            sampling=SamplingParameters(temperature=decoding.temperature),
        )
        for sample in samples
    ]
    return engine.generate(requests) if requests else []


def judge_pairs(
    judge: Judge,
    samples: Sequence[Sample],
    policy: Sequence[Sequence[Candidate]],
    baseline: Sequence[Sequence[Candidate]],
) -> PairedVerdicts:
    """Judges policy [n][s] against baseline [n][s] on the samples' prefixes.

    Every second pair is shown with the baseline first, so that a judge that prefers a place favours neither.
    """
    num_pairs = len(policy[0]) if policy else 0
    groups, flipped = [], []
    for row, sample in enumerate(samples):
        for column in range(num_pairs):
            pair = (policy[row][column], baseline[row][column])
            flip = (row + column) % 2 == 1
            groups.append(CandidateGroup(sample, pair[::-1] if flip else pair))
            flipped.append(flip)
    judgments = judge(groups) if groups else []
    shape = (len(samples), num_pairs)
    scores = [_unflip(judgment.scores, flip) for judgment, flip in zip(judgments, flipped, strict=True)]
    names = sorted({name for judgment in judgments for name in judgment.criteria})
    nothing = np.full(2, np.nan)
    criteria = {
        name: [
            _unflip(judgment.criteria.get(name, nothing), flip)
            for judgment, flip in zip(judgments, flipped, strict=True)
        ]
        for name in names
    }
    return PairedVerdicts(
        outcomes=outcomes(_side(scores, 0, shape), _side(scores, 1, shape)),
        policy_criteria={name: _side(values, 0, shape) for name, values in criteria.items()},
        baseline_criteria={name: _side(values, 1, shape) for name, values in criteria.items()},
    )


def concatenate_verdicts(parts: Sequence[PairedVerdicts]) -> PairedVerdicts:
    """The verdicts of all replicas as one; a replica without prefixes adds nothing."""
    full = [part for part in parts if len(part.outcomes)]
    if not full:
        return parts[0]
    names = sorted({name for part in full for name in part.policy_criteria})

    def side(pick: Callable[[PairedVerdicts], Mapping[str, FloatArray]]) -> dict[str, FloatArray]:
        missing = [np.full_like(part.outcomes, np.nan) for part in full]
        return {
            name: np.concatenate([pick(part).get(name, none) for part, none in zip(full, missing, strict=True)])
            for name in names
        }

    return PairedVerdicts(
        np.concatenate([part.outcomes for part in full]),
        side(lambda part: part.policy_criteria),
        side(lambda part: part.baseline_criteria),
    )


def _unflip(scores: FloatArray, flip: bool) -> FloatArray:
    """Scores [2] as (policy, baseline)."""
    return scores[::-1] if flip else scores


def _side(pairs: Sequence[FloatArray], side: int, shape: tuple[int, int]) -> FloatArray:
    return np.array([pair[side] for pair in pairs], dtype=np.float64).reshape(shape)


def _mean(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
