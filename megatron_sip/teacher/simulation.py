"""Plays pair schedules against a judge of known noise: what share of the attainable margin each of them reaches.

Candidates have normal utilities u; the judge prefers i to j with probability sigmoid(scale x (u_i - u_j)), each vote
drawn anew (Bradley and Terry 1952). What counts is the utility of the candidate with the highest total minus that of
the one with the lowest: the true margin of the pair that DPO learns from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_sip.teacher.interfaces import FloatArray, IntArray
from megatron_sip.teacher.schedule import BatchSchedule, make_batch

_MEDIAN_GAP = 0.6744897501960817 * np.sqrt(2)
"""Median distance of two normal utilities: the quartile of N(0, 2)."""
_CHUNK = 2_000
"""Groups played at once, for the sake of memory; the outcome does not depend on it."""


@dataclass(frozen=True)
class World:
    """Whom the schedules judge, and how well."""

    num_groups: int = 20_000
    num_candidates: int = 17
    accuracy: float = 0.8
    """Of one vote on two candidates at the median distance."""
    offset: float = 0.0
    """What a pointwise criterion that 70 % of the candidates meet adds to their totals, in units of quality."""
    seed: int = 0

    @property
    def scale(self) -> float:
        """Logits per unit of utility."""
        return float(np.log(self.accuracy / (1 - self.accuracy)) / _MEDIAN_GAP)


@dataclass(frozen=True)
class Outcome:
    """Of one schedule, means over groups."""

    comparisons: float
    rounds: int
    margin: float
    """True total of the chosen minus that of the rejected candidate; utilities if there is no offset."""
    best_found: float
    """Share of groups whose truly best candidate was chosen."""
    worst_found: float


class KnockOut:
    """For comparison: one knock-out tournament for the best and one for the worst, 2 (n - 1) comparisons.

    The score of a candidate is the number of rounds that it survived in the one minus that in the other.
    """

    def __init__(self, num_groups: int, num_candidates: int) -> None:
        alive = np.broadcast_to(np.arange(num_candidates), (num_groups, num_candidates))
        self._alive: list[IntArray] = [alive, alive]
        self._asked: IntArray = np.zeros((num_groups, 0, 2), dtype=np.int64)
        self._survived = np.zeros((num_groups, num_candidates))

    def next_round(self) -> IntArray:
        halves = [alive[:, : alive.shape[1] // 2 * 2].reshape(len(alive), -1, 2) for alive in self._alive]
        self._asked = np.concatenate(halves, axis=1)
        return self._asked

    def record(self, wins: FloatArray, votes: FloatArray) -> None:
        half, groups = self._asked.shape[1] // 2, np.arange(len(wins))[:, None]
        for side, (pairs, outcome) in enumerate(
            ((self._asked[:, :half], wins[:, :half]), (self._asked[:, half:], wins[:, half:]))
        ):
            first_stays = (outcome > 0.5) == (side == 0)
            stays = np.where(first_stays, pairs[:, :, 0], pairs[:, :, 1])
            np.add.at(self._survived, (groups, stays), 1.0 if side == 0 else -1.0)
            self._alive[side] = np.concatenate([stays, self._alive[side][:, 2 * half :]], axis=1)

    def scores(self) -> FloatArray:
        size = self._survived.shape[1]
        scores = self._survived / (2 * size) + 0.5
        # The winners of both, whatever byes they had.
        groups = np.arange(len(scores))
        scores[groups, self._alive[0][:, 0]], scores[groups, self._alive[1][:, 0]] = 1.0, 0.0
        return scores


def schedules(num_candidates: int, budget: int = 0) -> dict[str, Callable[[FloatArray], BatchSchedule]]:
    """Name -> offsets [P, n] -> a schedule: those of ``--pair-schedule``, and a knock-out."""
    kinds = ("suffix",) + ("rollout",) * (num_candidates - 1)

    def named(name: str) -> Callable[[FloatArray], BatchSchedule]:
        return lambda offsets: make_batch(name, kinds, "suffix", offsets, budget)

    makers = {name: named(name) for name in ("all", "pivot", "circular", "best_worst")}
    return {**makers, "knock-out": lambda offsets: KnockOut(*offsets.shape)}


def simulate(make: Callable[[FloatArray], BatchSchedule], world: World) -> Outcome:
    """Play all groups. The same world has the same candidates for every schedule; votes are drawn anew."""
    sums, rounds = np.zeros(4), 0
    for chunk, start in enumerate(range(0, world.num_groups, _CHUNK)):
        random = np.random.default_rng([world.seed, chunk])
        size = (min(_CHUNK, world.num_groups - start), world.num_candidates)
        utilities = random.standard_normal(size)
        offsets: FloatArray = world.offset * (random.random(size) < 0.7).astype(np.float64)
        schedule = make(offsets)
        comparisons, played = _play(schedule, world.scale * utilities, random)
        truth = utilities if world.offset == 0 else _shares(world.scale * utilities) + offsets
        # Equal scores are common with few votes: one of them is drawn, as the preference rule does.
        scores = schedule.scores() + offsets + 1e-9 * random.random(size)
        groups, best, worst = np.arange(size[0]), np.nanargmax(scores, axis=1), np.nanargmin(scores, axis=1)
        found_best, found_worst = best == truth.argmax(axis=1), worst == truth.argmin(axis=1)
        margin = (truth[groups, best] - truth[groups, worst]).sum()
        sums += (comparisons, margin, found_best.sum(), found_worst.sum())
        rounds = max(rounds, played)
    comparisons, margin, best_found, worst_found = sums / world.num_groups
    return Outcome(comparisons, rounds, margin, best_found, worst_found)


def _play(schedule: BatchSchedule, logits: FloatArray, random: np.random.Generator) -> tuple[int, int]:
    """Answers until the schedule is done; comparisons over all groups, and rounds."""
    comparisons = rounds = 0
    groups = np.arange(len(logits))[:, None]
    while (pairs := schedule.next_round()).shape[1]:
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        chance = 1 / (1 + np.exp(logits[groups, second] - logits[groups, first]))
        schedule.record((random.random(chance.shape) < chance).astype(np.float64), np.ones(chance.shape))
        comparisons += int((first != second).sum())
        rounds += 1
    return comparisons, rounds


def _shares(logits: FloatArray) -> FloatArray:
    """The expected share of the others that each candidate beats, [P, n]: what all pairs measure."""
    chance = 1 / (1 + np.exp(logits[:, None, :] - logits[:, :, None]))
    return np.asarray((chance.sum(axis=2) - 0.5) / (logits.shape[1] - 1), dtype=np.float64)
