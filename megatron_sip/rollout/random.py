"""Random numbers that are a function of what they are for, not of when they are drawn.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised in NumPy. A uniform's
address is (seed, step, sample, rollout, token position), so that a rollout comes out the same in whatever batch, on
whatever layout and after whatever restart it is drawn.

    R  rows, T  token positions
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10
_KEY_DOMAIN = np.uint64(0x524F4C4C)
"""Separates the numbers that make keys from any other use of the seed."""

Words = tuple[NDArray[np.uint64], ...]


def philox_4x32(counter: Words, key: Words) -> Words:
    """Four 32-bit words per (128-bit counter, 64-bit key); every word is held in a uint64 array of one common shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def token_uniforms(
    seed: ArrayLike, step: ArrayLike, sample_id: ArrayLike, rollout: ArrayLike, num_tokens: int
) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per row and token position: float64 [R, T].

    ``seed``, ``step``, ``sample_id`` and ``rollout`` are integers or int64 [R] that broadcast to one another.
    """
    seeds, steps, samples, rollouts = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(part, dtype=np.int64)) for part in (seed, step, sample_id, rollout))
    )
    seed_low, seed_high = _halves(seeds)
    step_low, step_high = _halves(steps)
    domain = np.full_like(seed_low, _KEY_DOMAIN)
    key0, key1, _, _ = philox_4x32((step_low, step_high, domain, np.zeros_like(domain)), (seed_low, seed_high))

    num_blocks = (num_tokens + 1) // 2
    sample_low, sample_high = _halves(samples)
    rollout_low, _ = _halves(rollouts)
    counter = np.broadcast_arrays(
        np.arange(num_blocks, dtype=np.uint64)[None, :],
        rollout_low[:, None],
        sample_low[:, None],
        sample_high[:, None],
    )
    words = philox_4x32(tuple(counter), (key0[:, None], key1[:, None]))
    bits = np.stack([words[0] << _32 | words[1], words[2] << _32 | words[3]], axis=-1)
    uniforms = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms.reshape(len(seeds), 2 * num_blocks)[:, :num_tokens]


def _halves(values: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Lower and upper 32 bits."""
    unsigned = np.ascontiguousarray(values).view(np.uint64)
    return unsigned & _LOW, unsigned >> _32
