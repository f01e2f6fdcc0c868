"""The values that stages hand to each other. Data flows one way:

documents -> samples -> candidates -> judgments -> preferences -> row batches -> loss -> step.

Shape legend
    B  rows of a micro-batch          P  width of the prefix block
    C  candidates in a row            T  width of a candidate block
    S  row length, P + C * T          L  scored positions of a row: C * T (SIP rows) or S (next-token rows)
    N  suffix length in tokens        h, g, d  attention heads, key-value groups, head width

A row is ``[prefix block | candidate block 1 | ... | candidate block C]``. Within its block a prefix and a candidate
stand at the left and are padded at the right. Each candidate attends to its row's prefix and to itself; its positions
go on from the prefix's true length. A next-token row is a prefix block alone (C = 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.floating]


class CandidateKind(str, Enum):
    """Where a candidate continuation comes from (paper, section 2.2)."""

    SUFFIX = "suffix"
    REWRITE = "rewrite"
    ROLLOUT = "rollout"


@dataclass(frozen=True)
class Document:
    """One document of a corpus, before tokenization."""

    document_id: str
    text: str
    source: str = ""


@dataclass(frozen=True)
class Sample:
    """A document cut into the prefix and the suffix that followed it (paper, section 2.1)."""

    sample_id: int
    """Position in the run's deterministic sample stream: the counter that seeds whatever is drawn for it."""
    document: int
    """Index of the document in its corpus."""
    prefix: IntArray
    """Token ids [<= P]."""
    suffix: IntArray
    """Token ids [<= N]."""


@dataclass(frozen=True)
class Candidate:
    """One continuation of a prefix."""

    kind: CandidateKind
    tokens: IntArray
    """Token ids [<= N]. A rollout ends at N tokens or with the end-of-document token, which is part of it."""
    rollout: int = 0
    """Number of the rollout, 0 for a suffix or a rewrite."""
    sampling_log_probs: FloatArray | None = None
    """Per token, of the untruncated softmax at T = 1, at the weights that sampled it; None if it was not sampled."""
    weight_version: int = -1
    """Optimizer steps behind the weights that sampled it; -1 if it was not sampled."""


@dataclass(frozen=True)
class CandidateGroup:
    """All candidates for one sample, in the order suffix, rewrite, rollout 0, rollout 1, ..."""

    sample: Sample
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Judgment:
    """What the teacher says of one group. A missing score is NaN, never 0."""

    scores: FloatArray
    """Weighted total per candidate, float64 [C]."""
    criteria: Mapping[str, FloatArray]
    """Score per criterion ("quality", "safety", "factuality"), float64 [C] each."""
    num_calls: int = 0
    num_failures: int = 0
    latency_s: float = 0.0


@dataclass(frozen=True)
class Preference:
    """What a judged group teaches. ``weight`` is 0 where it teaches nothing, and ``reason`` says why."""

    group: CandidateGroup
    judgment: Judgment | None
    chosen: int | None
    rejected: int | None
    weight: float
    reason: str = ""
    """"" or "tie", "missing", "identical": why the weight is 0."""


@dataclass(frozen=True)
class RowLayout:
    """Widths of a row's blocks; every row of one schedule call has the same."""

    prefix_block: int
    num_candidates: int
    candidate_block: int

    @property
    def length(self) -> int:
        """S."""
        return self.prefix_block + self.num_candidates * self.candidate_block

    @property
    def num_scored(self) -> int:
        """L."""
        return self.num_candidates * self.candidate_block if self.num_candidates else self.prefix_block


@dataclass(frozen=True)
class RowBatch:
    """One micro-batch in the shared-prefix layout: what the engine takes for every objective."""

    layout: RowLayout
    tokens: torch.Tensor
    """int64 [B, S]; padding is 0 and never scored."""
    positions: torch.Tensor
    """int64 [B, S], for RoPE."""
    prefix_lengths: torch.Tensor
    """int64 [B], each in 1..P."""
    targets: torch.Tensor
    """int64 [B, L]: the token that each scored position must predict."""
    sources: torch.Tensor
    """int64 [B, L]: index in the row of the hidden state that predicts it. A candidate's first token is predicted from
    the prefix's last position."""
    mask: torch.Tensor
    """float32 [B, L]: 1 where the target is real, 0 on padding."""
    weights: torch.Tensor
    """float32 [B]: 0 for a row that teaches nothing (tie, missing verdict, filler), else 1."""
    reference_log_probs: torch.Tensor | None = None
    """float32 [B, L], under the reference policy."""
    sampling_log_probs: torch.Tensor | None = None
    """float32 [B, L], at sampling time; NaN for the tokens of a candidate that was not sampled."""
    advantages: torch.Tensor | None = None
    """float32 [B, C], for GRPO."""

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    def num_real_tokens(self) -> torch.Tensor:
        """Scalar: tokens of rows that teach, each prefix once; the rest of B * S is padding."""
        real = self.prefix_lengths.to(self.mask.device)
        if self.layout.num_candidates:
            real = real + self.mask.sum(dim=1)
        return (real * (self.weights > 0)).sum()


@dataclass(frozen=True)
class ObjectiveTerms:
    """What an objective returns for a micro-batch: sums, divided once by a global count elsewhere."""

    loss_sum: torch.Tensor
    """Scalar with gradient: sum over the micro-batch's units."""
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Name -> (sum, count), both detached scalars; logged as the ratio of their global sums."""


class Objective(Protocol):
    """A pure function of log-probabilities."""

    @property
    def needs_reference(self) -> bool:
        """Whether it reads ``RowBatch.reference_log_probs``."""
        ...

    @property
    def is_linear(self) -> bool:
        """Whether ``loss_sum`` is linear in the log-probs: its gradient is then known before the forward pass."""
        ...

    def units(self, batch: RowBatch) -> float:
        """Number of valid units (tokens, or pairs) in a micro-batch, known before its forward pass."""
        ...

    def __call__(self, log_probs: torch.Tensor, batch: RowBatch) -> ObjectiveTerms:
        """``log_probs``: float32 [B, L] with gradient."""
        ...


@dataclass(frozen=True)
class TrainPass:
    """One schedule call: micro-batches of as many rows and scored positions, under one objective."""

    name: str
    batches: tuple[RowBatch, ...]
    objective: Objective
    scale: float
    """Curriculum weight / global number of units: the only factor between ``loss_sum`` and the gradient."""


class AttentionPlan(Protocol):
    """How the tokens of one forward pass attend to each other; the model asks it once per layer.

    Training rows and cached generation are two plans; the model knows neither.
    """

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, h, d], key and value [s, b, g, d], after RoPE and of this tensor-parallel rank -> [s, b, h * d].

        ``layer`` is the layer's global number, from 1.
        """
        ...


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    grad_norm: float
    skipped: bool
    """True if a gradient was NaN or Inf: no weight was changed."""
    learning_rate: float
    num_zeros: int | None = None
