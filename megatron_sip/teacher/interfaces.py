"""What goes to the teacher process and comes back, and what a judge or a rewriter is.

Nothing here, nor in what the process imports, needs torch: it starts in half a second and stays small.
A missing score is NaN everywhere, never 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Passage:
    """A piece of text in both forms that judges read."""

    tokens: IntArray
    """Token ids [n]."""
    text: str


@dataclass(frozen=True)
class JudgeGroup:
    """A prefix, its original continuation and the candidates to judge."""

    sample_id: int
    prefix: Passage
    reference: Passage
    """The original suffix."""
    candidates: tuple[Passage, ...]
    kinds: tuple[str, ...]
    """Per candidate "suffix", "rewrite" or "rollout"."""


@dataclass(frozen=True)
class JudgeRequest:
    groups: tuple[JudgeGroup, ...]
    learn: bool = True
    """False leaves running statistics of a judge as they are (evaluation, probes)."""
    step: int | None = None
    """Optimizer steps before it, for the ledger; None outside of training."""


@dataclass(frozen=True)
class GroupVerdict:
    """What the panel says of one group of C candidates."""

    scores: FloatArray
    """Weighted total, float64 [C]."""
    criteria: Mapping[str, FloatArray]
    """Per criterion, float64 [C]."""
    num_calls: int
    num_failures: int
    num_comparisons: int
    latency_s: float
    """From the first question to the last verdict, all rounds included."""


@dataclass(frozen=True)
class JudgeResult:
    groups: tuple[GroupVerdict, ...]
    num_cached: int = 0
    """Verdicts that came from the ledger; they are not among the calls."""
    num_both_orders: int = 0
    """Pairs that were asked in both orders and answered twice."""
    num_flips: int = 0
    """Of those, how many changed their verdict with the order."""
    latencies_s: FloatArray = field(default_factory=lambda: np.zeros(0))
    """Per call."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Missing verdicts per kind of failure (``megatron_sip.teacher.http.failures``; "other" for embedded judges)."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """Of each kind of failure one, word for word."""
    remote: Mapping[str, int] = field(default_factory=dict)
    """What the client counted since the last result: requests, attempts, retries, hedges, ..."""


@dataclass(frozen=True)
class RewriteItem:
    sample_id: int
    prefix: Passage
    suffix: Passage


@dataclass(frozen=True)
class RewriteRequest:
    items: tuple[RewriteItem, ...]
    step: int | None = None
    """Optimizer steps before it, for the ledger; None outside of training."""


@dataclass(frozen=True)
class Rewrite:
    text: str | None
    """None if there is no rewrite; ``failure`` then says why."""
    copied: bool = False
    """True if it is the suffix, unchanged."""
    failure: str = ""
    latency_s: float = 0.0


@dataclass(frozen=True)
class RewriteResult:
    rewrites: tuple[Rewrite, ...]


@dataclass(frozen=True)
class Question:
    """One vote: on one candidate (pointwise) or between two, the first of which is shown first (pairwise)."""

    group: JudgeGroup
    options: tuple[int, ...]
    vote: int


@dataclass(frozen=True)
class Verdict:
    score: float
    """Pairwise: 1 if the first option wins, 0 if the second does, 0.5 for a tie. Pointwise: the score. NaN: missing."""
    raw: str = ""
    """What the judge said, word for word."""
    failure: str = ""
    """Why the score is missing; "" otherwise."""
    latency_s: float = 0.0


@dataclass(frozen=True)
class JudgeIdentity:
    """Together with the prompt and the vote index, the key under which a verdict is kept."""

    name: str
    model: str
    """Name or fingerprint of the model, with the state of running statistics if it has any."""
    sampling: str
    """Temperature, top_p and the like; "" for a judge that draws nothing."""


class Judge(Protocol):
    """What the pairwise and the pointwise judges have in common."""

    criterion: str

    def identity(self) -> JudgeIdentity: ...

    def prompt_hash(self, question: Question) -> str:
        """SHA-256, in hexadecimal, of everything that the judge looks at, except the vote index."""
        ...

    async def ask(self, questions: Sequence[Question]) -> Sequence[Verdict]:
        """One verdict per question, in order. A failed call is a verdict of NaN with its reason, not an exception."""
        ...


class PairwiseJudge(Judge, Protocol):
    """Says which of two candidates is better: questions have two options."""


class PointwiseJudge(Judge, Protocol):
    """Scores a candidate by itself: questions have one option."""


@runtime_checkable
class RunningJudge(Protocol):
    """A judge with running statistics: requests reach it one after another, in the order of submission."""

    def observe(self, groups: Sequence[JudgeGroup]) -> None:
        """Called once per request, before its questions."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Rewriter(Protocol):
    async def rewrite(self, items: Sequence[RewriteItem]) -> Sequence[Rewrite]:
        """One rewrite per item, in order."""
        ...


@runtime_checkable
class RecordableRewriter(Rewriter, Protocol):
    """A rewriter whose answers a ledger keeps, because they are not the same each time."""

    def identity(self) -> JudgeIdentity: ...

    def prompt_hash(self, item: RewriteItem) -> str: ...


class ModelSource(Protocol):
    """Judges and a rewriter out of checkpoints of ours."""

    def judge(self, criterion: str) -> Any:
        """A pairwise judge for "quality", a pointwise one for "safety"."""
        ...

    def rewriter(self) -> Rewriter: ...


class Teacher(Protocol):
    """What a teacher process serves."""

    @property
    def learns(self) -> bool:
        """Whether its state depends on the requests that are under way: running statistics do, a ledger does not."""
        ...

    async def judge(self, request: JudgeRequest) -> JudgeResult: ...

    async def rewrite(self, request: RewriteRequest) -> RewriteResult: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    async def aclose(self) -> None: ...


class RemotePart(Protocol):
    """What judges over a network share: connections to close, and counts of what happened on the way."""

    def counts(self) -> Mapping[str, int]:
        """Since the start: requests, attempts, retries, hedges, ..."""
        ...

    async def aclose(self) -> None: ...


def passages_hash(passages: Sequence[Passage]) -> str:
    """SHA-256 over token ids and texts, with their lengths."""
    digest = hashlib.sha256()
    for passage in passages:
        tokens = np.ascontiguousarray(passage.tokens, dtype="<i8")
        text = passage.text.encode("utf-8", "surrogatepass")
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
