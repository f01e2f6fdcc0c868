"""Search for the best and the worst of each group with few comparisons.

The judge is taken to follow Bradley and Terry (1952): i is preferred to j with probability sigmoid(u_i - u_j), each
vote drawn anew. The unknown u have a Gaussian prior, the posterior is taken as Gaussian about its mode (Laplace). A
candidate's quality is the expected share of the others that it beats: what all pairs measure, so that it adds to the
other criteria in the same unit, whether a candidate was compared with all the others or with two of them.

A round compares pairs that hold the candidate which is now the best, or the worst, by *weighted total* (quality +
offset), where the other may yet turn out to lie beyond it: they are taken in the order of expected improvement,
E[max(0, total of the other - total of this one)] (Jones et al. 1998). That repeats close calls and leaves alone what is
decided. Everything is deterministic; a missing verdict is no evidence, and its pair is open again.
"""

from __future__ import annotations

import itertools

import numpy as np

from megatron_sip.teacher.interfaces import FloatArray, IntArray

MAX_ROUNDS = 8
_PRIOR_VARIANCE = 1.5
"""In squared logits: of two candidates at the median distance the better wins 3 votes of 4 or more."""
_ROUND_SHARE = 3
"""A round takes at most this part of what is left, so that later ones can act on it."""
_PER_CANDIDATE = 4
"""Comparisons of one candidate in one round: the next round knows better whom it should meet."""
_FIRST_PER_CANDIDATE = 1
_ELSEWHERE = 1e-3
"""Worth of a comparison without the best or the worst: only taken when none else is left in the round."""
_OVER_LIMIT = 1e-9
_AFTER_MISSING = 0.3
"""Worth of a comparison per missing verdict: a candidate that no judge answers must not use up the budget."""
_NEWTON_STEPS = 8
_LARGEST_STEP = 3.0


def default_budget(num_candidates: int) -> int:
    """12/5 per candidate and no more than all pairs: 40 (of 136) for 17 candidates."""
    return min(num_candidates * (num_candidates - 1) // 2, 12 * num_candidates // 5)


class BestWorst:
    """For P groups of n candidates. Those with an offset of NaN have no total: they are not asked about."""

    def __init__(self, offsets: FloatArray, budget: int = 0) -> None:
        """``offsets``: float64 [P, n], what other criteria add to the total, in units of quality.

        ``budget``: comparisons per group, over all rounds; 0 takes ``default_budget``.
        """
        num_groups, size = offsets.shape
        self._offsets = np.asarray(offsets, dtype=np.float64)
        self._usable = np.isfinite(self._offsets)
        pairs = np.array(list(itertools.combinations(range(size), 2)), dtype=np.int64).reshape(-1, 2)
        self._first, self._second = pairs[:, 0], pairs[:, 1]
        self._left = (budget or default_budget(size)) if len(pairs) else 0
        self._rounds_left = MAX_ROUNDS
        self._asked: IntArray = np.zeros((num_groups, 0, 2), dtype=np.int64)
        self._wins = np.zeros((num_groups, size, size))
        """[p, i, j]: votes for i against j."""
        self._missing = np.zeros((num_groups, size, size))
        """[p, i, j]: verdicts on i and j that are missing; symmetric."""
        self._mean = np.zeros((num_groups, size))
        self._covariance = np.broadcast_to(_PRIOR_VARIANCE * np.eye(size), (num_groups, size, size)).copy()

    def next_round(self) -> IntArray:
        size = self._mean.shape[1]
        share = max(-(-self._left // max(1, self._rounds_left)), min(size // 2, -(-self._left // _ROUND_SHARE)))
        number = min(self._left, share)
        worth = self._worth() if number else np.zeros((len(self._mean), 0))
        limit = max(
            -(-2 * number // max(1, size)), _FIRST_PER_CANDIDATE if self._rounds_left == MAX_ROUNDS else _PER_CANDIDATE
        )
        groups, used = np.arange(len(self._mean)), np.zeros(self._mean.shape)
        chosen = []
        for _ in range(number):
            # Over the limit only when nothing else is left; a closed pair (worth -1) never.
            spent = (used[:, self._first] >= limit) | (used[:, self._second] >= limit)
            pair = np.where(spent & (worth > 0), _OVER_LIMIT * worth, worth).argmax(axis=1)
            first, second = self._first[pair], self._second[pair]
            open_pair = worth[groups, pair] >= 0
            chosen.append(np.stack([first, np.where(open_pair, second, first)], axis=1))
            used[groups, first] += 1
            used[groups, second] += 1
            worth[groups, pair] = -1.0
        self._left -= number
        self._rounds_left -= 1
        self._asked = np.stack(chosen, axis=1) if chosen else self._asked[:, :0]
        return self._asked

    def record(self, wins: FloatArray, votes: FloatArray) -> None:
        groups = np.arange(len(self._mean))
        for index in range(self._asked.shape[1]):
            first, second = self._asked[:, index, 0], self._asked[:, index, 1]
            asked = first != second
            valid = asked & np.isfinite(wins[:, index])
            self._missing[groups, first, second] += asked & ~valid
            self._missing[groups, second, first] += asked & ~valid
            share, weight = np.where(valid, wins[:, index], 0.0), np.where(valid, votes[:, index], 0.0)
            self._wins[groups, first, second] += weight * share
            self._wins[groups, second, first] += weight * (1 - share)
        self._update()

    def scores(self) -> FloatArray:
        compared = (self._wins + self._wins.transpose(0, 2, 1)).sum(axis=2) > 0
        quality, _ = self._quality(compared)
        return np.where(compared, quality, np.nan)

    def _update(self) -> None:
        """Mode and curvature of the posterior, by Newton's method from where it was."""
        counts = self._wins + self._wins.transpose(0, 2, 1)
        diagonal = np.arange(self._mean.shape[1])
        for _ in range(_NEWTON_STEPS):
            chance = _sigmoid(self._mean[:, :, None] - self._mean[:, None, :])
            gradient = (self._wins - counts * chance).sum(axis=2) - self._mean / _PRIOR_VARIANCE
            weight = counts * chance * (1 - chance)
            precision = -weight
            precision[:, diagonal, diagonal] += weight.sum(axis=2) + 1 / _PRIOR_VARIANCE
            self._covariance = np.linalg.inv(precision).astype(np.float64, copy=False)
            step = (self._covariance * gradient[:, None, :]).sum(axis=2)
            self._mean = self._mean + np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)

    def _quality(self, among: np.ndarray) -> tuple[FloatArray, FloatArray]:
        """Expected share of the others in ``among`` that each candidate beats, and its slope in u; both [P, n]."""
        own = np.diagonal(self._covariance, axis1=1, axis2=2)
        variance = np.maximum(own[:, :, None] + own[:, None, :] - 2 * self._covariance, 0.0)
        # The mean of a sigmoid under a Gaussian, to within 0.02 (MacKay 1992).
        chance = _sigmoid((self._mean[:, :, None] - self._mean[:, None, :]) / np.sqrt(1 + np.pi / 8 * variance))
        others = among[:, None, :] & ~np.eye(among.shape[1], dtype=bool)
        number = np.maximum(others.sum(axis=2), 1)
        return (chance * others).sum(axis=2) / number, (chance * (1 - chance) * others).sum(axis=2) / number

    def _worth(self) -> FloatArray:
        """Of each pair, float64 [P, pairs]; -1 for one with a candidate that has no total."""
        first, second = self._first, self._second
        quality, slope = self._quality(self._usable)
        total = np.where(self._usable, quality + self._offsets, 0.0)
        spread = self._covariance * slope[:, :, None] * slope[:, None, :]
        own = np.diagonal(spread, axis1=1, axis2=2)
        deviation = np.sqrt(np.maximum(own[:, first] + own[:, second] - 2 * spread[:, first, second], 1e-12))
        gain = _expected_improvement(np.abs(total[:, first] - total[:, second]), deviation)
        best = np.where(self._usable, total, -np.inf).argmax(axis=1)[:, None]
        worst = np.where(self._usable, total, np.inf).argmin(axis=1)[:, None]
        at_end = (first == best) | (second == best) | (first == worst) | (second == worst)
        # Rounded, so that what is equal but for the order of additions is equal.
        # Of a pair without an answer only one may be to blame: both are asked about once more, but not together.
        blame = np.maximum(self._missing.sum(axis=2) - 1, 0)
        answered = _AFTER_MISSING ** (blame[:, first] + blame[:, second] + self._missing[:, first, second])
        worth = np.round(np.where(at_end, gain, _ELSEWHERE * gain) * answered, 12)
        return np.where(self._usable[:, first] & self._usable[:, second], worth, -1.0)


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), dtype=np.float64)


def _expected_improvement(gap: FloatArray, deviation: FloatArray) -> FloatArray:
    """E[max(0, x)] of a Gaussian x with mean -gap; its distribution function to within 2e-4 (Bowling et al. 2009)."""
    z = gap / deviation
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return np.asarray(deviation * (density - z * _sigmoid(-1.5976 * z - 0.07056 * z**3)), dtype=np.float64)
