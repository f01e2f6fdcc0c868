"""Which candidates compete for a prefix, and their order in a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.errors import ConfigurationError
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, IntArray, Sample

_SYNTAX = "a comma-separated list of suffix, rewrite and rollout:K, such as suffix,rewrite,rollout:16"

_MAX_ROLLOUTS = 4096
"""Of one prefix; far beyond what is of use (the paper's most is 16), and what a mistyped number would exceed."""


@dataclass(frozen=True)
class CandidatePool:
    """What the judge chooses among, for every prefix of a run (paper, Tables 1, 2, 6, 7, 14 and 18)."""

    suffix: bool
    rewrite: bool
    num_rollouts: int

    @classmethod
    def parse(cls, text: str) -> CandidatePool:
        """Reads ``suffix,rewrite,rollout:16``; the order does not matter. Raises ConfigurationError."""
        counts: dict[CandidateKind, int] = {}
        for entry in text.split(","):
            kind, count = _parse_entry(entry.strip(), text)
            if kind in counts:
                raise ConfigurationError(f"--candidates {text!r} names {kind.value} twice: give {_SYNTAX}.")
            counts[kind] = count
        return cls(
            suffix=CandidateKind.SUFFIX in counts,
            rewrite=CandidateKind.REWRITE in counts,
            num_rollouts=counts.get(CandidateKind.ROLLOUT, 0),
        )

    @property
    def num_candidates(self) -> int:
        return self.suffix + self.rewrite + self.num_rollouts

    @property
    def kinds(self) -> tuple[CandidateKind, ...]:
        """The kind of each candidate of a full group, in its order."""
        return (
            (CandidateKind.SUFFIX,) * self.suffix
            + (CandidateKind.REWRITE,) * self.rewrite
            + (CandidateKind.ROLLOUT,) * self.num_rollouts
        )

    @property
    def chance(self) -> dict[str, float]:
        """Kind -> how often one that is drawn blindly from a full group is of it: what a chosen rate compares with."""
        kinds = self.kinds
        return {kind.value: kinds.count(kind) / len(kinds) for kind in dict.fromkeys(kinds)}

    def __str__(self) -> str:
        parts = ["suffix"] * self.suffix + ["rewrite"] * self.rewrite
        return ",".join([*parts, f"rollout:{self.num_rollouts}"] if self.num_rollouts else parts)


def _parse_entry(entry: str, text: str) -> tuple[CandidateKind, int]:
    name, colon, number = entry.partition(":")
    if name not in {kind.value for kind in CandidateKind}:
        raise ConfigurationError(f"--candidates {text!r} has the unknown entry {entry!r}: give {_SYNTAX}.")
    kind = CandidateKind(name)
    if not colon:
        return kind, 1
    if kind is not CandidateKind.ROLLOUT:
        raise ConfigurationError(f"--candidates {text!r}: a prefix has one {name}, so drop {colon + number!r}.")
    if not (number.isascii() and number.isdigit() and 0 < int(number[:9]) <= _MAX_ROLLOUTS):
        raise ConfigurationError(f"--candidates {text!r}: {entry!r} needs 1 to {_MAX_ROLLOUTS} rollouts.")
    return kind, int(number)


def build_group(
    sample: Sample, pool: CandidatePool, rollouts: Sequence[Candidate] = (), rewrite: IntArray | None = None
) -> CandidateGroup:
    """Puts a sample's candidates in order: suffix, rewrite, rollouts.

    ``rewrite``: token ids [<= N], or None where the rewriter gave nothing usable; the group is then one smaller.
    """
    candidates: list[Candidate] = []
    if pool.suffix:
        candidates.append(Candidate(CandidateKind.SUFFIX, sample.suffix))
    if pool.rewrite and rewrite is not None and len(rewrite) > 0:
        candidates.append(Candidate(CandidateKind.REWRITE, rewrite))
    assert len(rollouts) == pool.num_rollouts, (len(rollouts), pool)
    candidates.extend(rollouts)
    return CandidateGroup(sample, tuple(candidates))
