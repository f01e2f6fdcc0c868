"""Which prompts a full file surely does not hold, in ten bits a prompt: a Bloom filter over their digests."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

_BITS_PER_KEY = 10
_PROBES = 5


class Bloom:
    """About 1 % of the prompts that it does not hold pass for held."""

    def __init__(self, bits: NDArray[np.uint8]) -> None:
        """``bits``: uint8 [bytes], eight bits each."""
        self._bits = bits

    @classmethod
    def of(cls, keys: Sequence[bytes]) -> Bloom:
        """``keys``: digests of 16 bytes."""
        bits = np.zeros(max(8, len(keys) * _BITS_PER_KEY // 8 + 1), dtype=np.uint8)
        if keys:
            places = _places(keys, bits.size * 8).ravel()
            np.bitwise_or.at(bits, places >> 3, (1 << (places & 7)).astype(np.uint8))
        return cls(bits)

    @classmethod
    def load(cls, data: bytes) -> Bloom:
        return cls(np.frombuffer(data, dtype=np.uint8))

    def dump(self) -> bytes:
        return self._bits.tobytes()

    def may_hold(self, keys: Collection[bytes]) -> set[bytes]:
        """Those that may be there; the others are not."""
        ordered = list(keys)
        if not ordered:
            return set()
        places = _places(ordered, self._bits.size * 8)
        held = ((self._bits[places >> 3] >> (places & 7).astype(np.uint8)) & 1).all(axis=1)
        return {key for key, there in zip(ordered, held, strict=True) if there}


def _places(keys: Sequence[bytes], num_bits: int) -> NDArray[np.int64]:
    """int64 [keys, probes]: a digest's halves are two independent hashes."""
    halves = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
    probes = np.arange(_PROBES, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = halves[:, :1] + probes * halves[:, 1:]
    return (mixed % np.uint64(num_bits)).astype(np.int64)
