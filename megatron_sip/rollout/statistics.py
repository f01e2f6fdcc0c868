"""What the log says about a step's rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from megatron_sip.types import Candidate, IntArray

_NGRAM = 3


def rollout_sums(rollouts: Iterable[Candidate], eod: int) -> dict[str, float]:
    """Counts to be added up over ranks: ``rollouts``, ``tokens``, ``eod``, ``trigrams``, ``repeated_trigrams``."""
    sums = dict.fromkeys(("rollouts", "tokens", "eod", "trigrams", "repeated_trigrams"), 0.0)
    for rollout in rollouts:
        total, repeated = _count_trigrams(rollout.tokens)
        sums["rollouts"] += 1
        sums["tokens"] += len(rollout.tokens)
        sums["eod"] += float(len(rollout.tokens) > 0 and rollout.tokens[-1] == eod)
        sums["trigrams"] += total
        sums["repeated_trigrams"] += repeated
    return sums


def rollout_scalars(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """TensorBoard scalars from summed counts and the wall time in which they were generated, in seconds.

    ``repetition`` is the share of trigrams that stood earlier in the same rollout. Empty if there was no rollout.
    """
    if not sums["rollouts"]:
        return {}
    return {
        "rollout/tokens_per_s": sums["tokens"] / max(seconds, 1e-9),
        "rollout/length": sums["tokens"] / sums["rollouts"],
        "rollout/repetition": sums["repeated_trigrams"] / max(sums["trigrams"], 1.0),
        "rollout/eod_rate": sums["eod"] / sums["rollouts"],
    }


def _count_trigrams(tokens: IntArray) -> tuple[int, int]:
    """All trigrams, and those that stood before."""
    if len(tokens) < _NGRAM:
        return 0, 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, _NGRAM)
    return len(windows), len(windows) - len(np.unique(windows, axis=0))
