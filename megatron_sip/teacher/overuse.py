"""Running statistics of what the policy writes: which trigrams turn up for far more prompts than real text explains.

No judge that sees one sample alone can tell boilerplate that fits everywhere from a good continuation. For a trigram g,

    share(g) = prompts whose rollouts hold g / prompts          (both decayed, so that old policies are forgotten)
    fair(g)  = TOLERANCE x (FLOOR + N x count(g) / tokens)      N tokens of real text, counted in the judge's corpus
    penalty  = mean over the candidate's trigrams of clip(log(share / fair), 0, LIMIT)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.teacher.interfaces import FloatArray, IntArray, JudgeGroup
from megatron_sip.teacher.ngram import NgramModel

DECAY = 0.98
"""Per request: a memory of about 50 requests."""
FLOOR = 0.02
"""A trigram that real text hardly knows may still turn up for this share of the prompts."""
TOLERANCE = 2.0
LIMIT = 3.0
"""Nats at most per trigram."""
_MIN_PROMPTS = 8.0
"""With fewer prompts seen than this, a share says nothing."""
_FORGET = 0.05
"""Decayed counts below this are dropped."""


class History:
    """Names a state of running statistics by the rollouts that went into it, request by request."""

    def __init__(self) -> None:
        self.digest = ""
        """SHA-256 in hexadecimal; "" before the first request."""

    def observe(self, groups: Sequence[JudgeGroup]) -> None:
        """Take in one request."""
        digest = hashlib.sha256(self.digest.encode())
        for group in groups:
            for tokens in _rollouts(group):
                digest.update(len(tokens).to_bytes(8, "little") + tokens.astype("<i8").tobytes())
        self.digest = digest.hexdigest()


def _rollouts(group: JudgeGroup) -> list[IntArray]:
    """Token ids of each rollout, int64 [n]."""
    return [
        np.asarray(candidate.tokens, dtype=np.int64)
        for candidate, kind in zip(group.candidates, group.kinds, strict=True)
        if kind == "rollout"
    ]


class OveruseStatistics:
    """Deterministic in the sequence of observed requests; the state is small and goes into checkpoints."""

    def __init__(self, model: NgramModel) -> None:
        if model.order < 3:
            raise DataError(
                f"the judge model counts {model.order}-grams, its overuse penalty needs trigrams: fit it with "
                "--order 3 or more, or set quality-settings overuse=0"
            )
        self._model = model
        self._keys: IntArray = np.zeros(0, dtype=np.int64)
        self._counts: FloatArray = np.zeros(0)
        self._prompts = 0.0
        self._length = 1.0
        self.history = History()
        """All that was observed: verdicts are kept under its name."""

    def observe(self, groups: Sequence[JudgeGroup]) -> None:
        """Count each group's rollouts; K rollouts of one prompt count once."""
        self.history.observe(groups)
        seen, lengths = [], []
        for group in groups:
            if rollouts := _rollouts(group):
                seen.append(np.unique(np.concatenate([self._trigrams(tokens) for tokens in rollouts])))
                lengths.append(sum(map(len, rollouts)))
        if not seen:
            return
        keys = np.concatenate([self._keys, *seen])
        counts = np.concatenate([self._counts * DECAY, *(np.ones(len(found)) for found in seen)])
        unique, inverse = np.unique(keys, return_inverse=True)
        total: FloatArray = np.bincount(inverse, weights=counts, minlength=len(unique)).astype(np.float64)
        keep = total >= _FORGET
        self._keys, self._counts = unique[keep], total[keep]
        before = self._prompts * DECAY
        self._prompts = before + len(seen)
        self._length = (self._length * before + sum(lengths)) / self._prompts

    def penalty(self, tokens: IntArray) -> float:
        """Nats per token, 0..LIMIT."""
        keys = self._trigrams(np.asarray(tokens, dtype=np.int64))
        if self._prompts < _MIN_PROMPTS or not len(keys) or not len(self._keys):
            return 0.0
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        share = np.where(self._keys[at] == keys, self._counts[at], 0.0) / self._prompts
        real = self._model.ngram_counts(self._split(keys)) / self._model.num_tokens
        fair = TOLERANCE * (FLOOR + self._length * real)
        return float(np.clip(np.log(np.maximum(share, 1e-9) / fair), 0.0, LIMIT).mean())

    def state_dict(self) -> dict[str, Any]:
        return {
            "keys": self._keys.copy(),
            "counts": self._counts.copy(),
            "prompts": self._prompts,
            "length": self._length,
            "history": self.history.digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "keys" not in state:
            raise ValueError("this checkpoint comes from a replayed run, which kept no statistics: replay its rest too")
        self._keys = np.asarray(state["keys"], dtype=np.int64).copy()
        self._counts = np.asarray(state["counts"], dtype=np.float64).copy()
        self._prompts = float(state["prompts"])
        self._length = float(state["length"])
        self.history.digest = str(state["history"])

    def _trigrams(self, tokens: IntArray) -> IntArray:
        """One int64 key per trigram; a vocabulary of up to two million tokens fits."""
        if len(tokens) < 3:
            return np.zeros(0, dtype=np.int64)
        vocab = self._model.vocab_size
        return (tokens[:-2] * vocab + tokens[1:-1]) * vocab + tokens[2:]

    def _split(self, keys: IntArray) -> IntArray:
        vocab = self._model.vocab_size
        return np.stack([keys // vocab**2, keys // vocab % vocab, keys % vocab], axis=1)
