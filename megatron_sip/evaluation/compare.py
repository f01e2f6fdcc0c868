"""The whole comparison of two policies: generate, judge, gather over replicas, summarize."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_sip.evaluation.guards import Guards, measure_guards
from megatron_sip.evaluation.paired import (
    Decoding,
    Judge,
    PairedVerdicts,
    concatenate_verdicts,
    continue_prefixes,
    judge_pairs,
)
from megatron_sip.evaluation.win_rate import WinRate, coherence_outcomes, win_rate
from megatron_sip.rollout import RolloutEngine
from megatron_sip.types import Candidate, Sample

T = TypeVar("T")
Continuations = list[list[Candidate]]


class Replicas(Protocol):
    """What of ``ParallelContext`` is needed: an object from every data-parallel replica."""

    def gather_over_data_parallel(self, obj: T) -> list[T]:
        """The objects of all replicas, in their order, on each of them."""
        ...


@dataclass(frozen=True)
class Comparison:
    """What one judge says at one way of decoding."""

    decoding: str
    judge: str
    win_rate: WinRate
    criteria: Mapping[str, tuple[float, float]]
    """Mean score of policy and baseline per criterion; as a judge of pairs scores them, the two of a pair at a time."""


@dataclass(frozen=True)
class DecodingGuards:
    """What needs no judge, at one way of decoding, of one continuation per prefix."""

    decoding: str
    policy: Guards
    baseline: Guards
    coherence: WinRate
    """How often the policy repeats itself less than the baseline."""


@dataclass(frozen=True)
class Evaluation:
    """Result of a comparison."""

    num_prefixes: int
    comparisons: tuple[Comparison, ...]
    guards: tuple[DecodingGuards, ...]
    suffix_guards: Guards
    """Of the original suffixes: what real text measures at this number of prefixes."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def generate_all(
    engine: RolloutEngine,
    samples: Sequence[Sample],
    decodings: Sequence[Decoding],
    advance: Callable[[int], None] = lambda count: None,
    chunk: int = 32,
) -> dict[str, Continuations]:
    """Continuations of the prefixes by way of decoding, with the weights that the engine has now.

    Collective over a replica. ``advance`` is told the number of prefixes done, every ``chunk`` of them.
    """
    continuations: dict[str, Continuations] = {}
    for decoding in decodings:
        done: Continuations = []
        for start in range(0, len(samples), chunk):
            part = samples[start : start + chunk]
            done += continue_prefixes(engine, part, decoding)
            advance(len(part))
        continuations[decoding.name] = done
    return continuations


def evaluate(
    samples: Sequence[Sample],
    policy: Mapping[str, Continuations],
    baseline: Mapping[str, Continuations],
    judges: Mapping[str, Judge],
    replicas: Replicas,
    confidence: float = 0.95,
    seed: int = 0,
    cut_to_shorter: bool = False,
) -> Evaluation:
    """Compares what ``generate_all`` made of this replica's samples with two policies' weights.

    ``cut_to_shorter``: judges see both of a pair cut to the shorter one's length; the guards measure them whole.

    Collective: every rank calls it, with judges that answer equally on all ranks of a replica.
    """
    comparisons, guards = [], []
    for name, ours in policy.items():
        theirs = baseline[name]
        first_ours, first_theirs = _gather_first(ours, replicas), _gather_first(theirs, replicas)
        coherence = win_rate(coherence_outcomes(first_ours, first_theirs), confidence, seed)
        guards.append(DecodingGuards(name, measure_guards(first_ours), measure_guards(first_theirs), coherence))
        for judge_name, judge in judges.items():
            shown = cut_pairs(ours, theirs) if cut_to_shorter else (ours, theirs)
            own: PairedVerdicts = judge_pairs(judge, samples, *shown)
            verdicts = concatenate_verdicts(replicas.gather_over_data_parallel(own))
            rate = win_rate(verdicts.outcomes, confidence, seed)
            comparisons.append(Comparison(name, judge_name, rate, verdicts.criterion_means()))
    suffixes = _flat(replicas.gather_over_data_parallel([sample.suffix.tolist() for sample in samples]))
    return Evaluation(len(suffixes), tuple(comparisons), tuple(guards), measure_guards(suffixes))


def cut_pairs(ours: Continuations, theirs: Continuations) -> tuple[Continuations, Continuations]:
    """Both continuations of each pair, without what one has beyond the other's end."""

    def cut(continuations: Continuations, others: Continuations) -> Continuations:
        return [
            [_cut(own, len(other.tokens)) for own, other in zip(row, other_row, strict=True)]
            for row, other_row in zip(continuations, others, strict=True)
        ]

    return cut(ours, theirs), cut(theirs, ours)


def _cut(candidate: Candidate, length: int) -> Candidate:
    scored = candidate.sampling_log_probs
    return replace(
        candidate, tokens=candidate.tokens[:length], sampling_log_probs=None if scored is None else scored[:length]
    )


def render_table(evaluation: Evaluation) -> str:
    """The result as text for a terminal."""
    lines = [f"{evaluation.num_prefixes} prefixes", ""]
    head = f"{'decoding':<10}{'judge':<22}{'win rate':>9}  {'interval':<17}{'win/tie/loss':<18}{'missing':>7}"
    lines += [head, "-" * len(head)]
    for item in evaluation.comparisons:
        rate = item.win_rate
        interval = f"{rate.low:.1%} .. {rate.high:.1%}"
        counts = f"{rate.wins}/{rate.ties}/{rate.losses}"
        lines.append(
            f"{item.decoding:<10}{item.judge:<22}{rate.rate:>9.1%}  {interval:<17}{counts:<18}{rate.missing:>7}"
        )
        lines += [f"{'':<12}{name}: {ours:.3f} against {theirs:.3f}" for name, (ours, theirs) in item.criteria.items()]
    for guarded in evaluation.guards:
        rate = guarded.coherence
        lines.append(
            f"{guarded.decoding:<10}{'repeats itself less':<22}{rate.rate:>9.1%}  {rate.low:.1%} .. {rate.high:.1%}"
        )
    head = (
        f"{'guards':<22}{'distinct-2':>11}{'top token':>11}{'repeated 3':>12}{'boilerplate':>13}{'length':>8}  broken"
    )
    lines += ["", head, "-" * len(head)]
    for guarded in evaluation.guards:
        lines.append(_guard_line(f"{guarded.decoding} policy", guarded.policy))
        lines.append(_guard_line(f"{guarded.decoding} baseline", guarded.baseline))
    lines.append(_guard_line("original suffixes", evaluation.suffix_guards))
    return "\n".join(lines)


def _guard_line(name: str, guards: Guards) -> str:
    broken = "; ".join(guards.violations()) or "-"
    return (
        f"{name:<22}{guards.distinct_2:>11.3f}{guards.max_token_share:>11.1%}{guards.repeated_trigrams:>12.1%}"
        f"{guards.boilerplate:>13.1%}{guards.length:>8.1f}  {broken}"
    )


def _gather_first(continuations: Continuations, replicas: Replicas) -> list[list[int]]:
    """The first continuation of every prefix of all replicas: more of them would lower the pooled shares."""
    return _flat(replicas.gather_over_data_parallel([_tokens(row[0]) for row in continuations]))


def _tokens(candidate: Candidate) -> list[int]:
    return [int(token) for token in np.asarray(candidate.tokens)]


def _flat(parts: Sequence[list[list[int]]]) -> list[list[int]]:
    return [tokens for part in parts for tokens in part]
