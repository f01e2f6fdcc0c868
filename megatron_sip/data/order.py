"""Orders and draws as pure functions of counters: nothing is stored, and any position can be asked for at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 6
_PATTERN_LENGTH = 1 << 16


def mix(*values: int) -> int:
    """A 64-bit hash of integers (the finalizer of splitmix64, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def draw(low: int, high: int, *key: int) -> int:
    """An integer in ``low..high`` (both included), uniform to 2^-64 of the range, that depends on ``key`` alone."""
    return low + (mix(*key) * (high - low + 1) >> 64)


def permute(index: int, size: int, *key: int) -> int:
    """Where ``index`` of ``0..size-1`` goes in a pseudo-random permutation that depends on ``key`` alone.

    A Feistel network on the next power of two; results beyond ``size`` are sent through it again (cycle walking), which
    keeps it a permutation.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} of a permutation of {size}")
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << bits - low_bits) - 1
    round_keys = [mix(*key, number) for number in range(_ROUNDS)]
    value = index
    while True:
        low, high = value & low_mask, value >> low_bits
        for number, round_key in enumerate(round_keys):
            if number % 2:
                low ^= mix(round_key, high) & low_mask
            else:
                high ^= mix(round_key, low) & high_mask
        value = high << low_bits | low
        if value < size:
            return value


class BlendOrder:
    """Which source each sample of a blend comes from, evenly interleaved.

    Weights are rounded to 1/65536, no source with a positive weight below that. After any number of samples each source
    has had its share to within about one sample.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        shares = shares / shares.sum() * _PATTERN_LENGTH
        counts = np.maximum(np.floor(shares), 1).astype(np.int64)
        while counts.sum() < _PATTERN_LENGTH:
            counts[np.argmax(shares - counts)] += 1
        while counts.sum() > _PATTERN_LENGTH:
            counts[np.argmax(np.where(counts > 1, counts - shares, -np.inf))] -= 1
        self._counts = counts
        # Sample j of a source that has n per pattern is due at (j + ½) / n.
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        source = np.repeat(np.arange(len(counts)), counts)
        within = np.concatenate([np.arange(n) for n in counts])
        order = np.argsort(due, kind="stable")
        self._source: NDArray[np.int64] = source[order]
        self._within: NDArray[np.int64] = within[order]

    def locate(self, position: int) -> tuple[int, int]:
        """(source, position in that source's own stream) of a position in the blend."""
        pattern, offset = divmod(position, _PATTERN_LENGTH)
        source = int(self._source[offset])
        return source, pattern * int(self._counts[source]) + int(self._within[offset])
