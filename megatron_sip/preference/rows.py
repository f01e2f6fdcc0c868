"""Preferences -> micro-batches of shared-prefix rows, alike but for their prefix blocks (see ``types.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_sip.preference.config import PREFIX_BUCKET
from megatron_sip.types import Candidate, CandidateGroup, FloatArray, IntArray, Preference, RowBatch, RowLayout

_NO_TOKENS: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class RowShape:
    """What the micro-batches of one schedule call look like."""

    micro_batch_size: int
    candidate_block: int
    """T: the suffix length N of the run."""
    prefix_block: int | None = None
    """P before rounding, the same for all micro-batches; None fits it to each micro-batch."""
    pad_multiple: int = 1
    """P is raised until S = P + C * T is a multiple of this (tensor-parallel size under sequence parallel)."""


@dataclass(frozen=True)
class Row:
    """One row before padding."""

    prefix: IntArray
    """Token ids [1..P]."""
    continuations: tuple[IntArray, ...]
    """C arrays of token ids [<= T]; an empty one is a block of padding."""
    weight: float = 1.0
    sampling_log_probs: tuple[FloatArray | None, ...] | None = None
    """float [<= T] per continuation, None for one that was not sampled; None if none was."""
    advantages: FloatArray | None = None
    """float [C]."""


def longest_first(prefixes: Sequence[IntArray]) -> list[int]:
    """The order in which rows of like prefix length share their micro-batches, which then have little padding."""
    return sorted(range(len(prefixes)), key=lambda index: -len(prefixes[index]))


def pair_rows(preferences: Sequence[Preference], shape: RowShape) -> tuple[RowBatch, ...]:
    """[chosen, rejected] rows (C = 2) for DPO; a preference of weight 0 keeps its place as a row of weight 0."""
    rows = [_preferred(p, (p.chosen, p.rejected)) for p in preferences]
    return build_rows(rows, shape, num_candidates=2)


def chosen_rows(preferences: Sequence[Preference], shape: RowShape) -> tuple[RowBatch, ...]:
    """[chosen] rows (C = 1) for RF-NLL and SFT."""
    return build_rows([_preferred(p, (p.chosen,)) for p in preferences], shape, num_candidates=1)


def candidate_rows(
    groups: Sequence[CandidateGroup], picks: Sequence[int | None], shape: RowShape
) -> tuple[RowBatch, ...]:
    """[candidate] rows (C = 1) without a preference, for the suffix and rewrite streams.

    ``picks``: index of the candidate per group; None (such as a rewrite that failed) gives a row of weight 0.
    """
    rows = []
    for group, pick in zip(groups, picks, strict=True):
        candidates = () if pick is None else (group.candidates[pick],)
        rows.append(_row(group.sample.prefix, candidates, num_candidates=1, weight=float(pick is not None)))
    return build_rows(rows, shape, num_candidates=1)


def group_rows(
    groups: Sequence[CandidateGroup],
    shape: RowShape,
    advantages: Sequence[FloatArray] | None = None,
    weights: Sequence[float] | None = None,
    num_micro_batches: int | None = None,
) -> tuple[RowBatch, ...]:
    """Rows of all candidates (C = K) for GRPO; every group has the same number of them.

    ``num_micro_batches``: as for ``build_rows``.
    """
    num_candidates = len(groups[0].candidates)
    rows = []
    for index, group in enumerate(groups):
        rows.append(
            _row(
                group.sample.prefix,
                group.candidates,
                num_candidates,
                weight=1.0 if weights is None else float(weights[index]),
                advantages=None if advantages is None else advantages[index],
            )
        )
    return build_rows(rows, shape, num_candidates, num_micro_batches)


def build_rows(
    rows: Sequence[Row], shape: RowShape, num_candidates: int, num_micro_batches: int | None = None
) -> tuple[RowBatch, ...]:
    """Rows in order, in micro-batches of one size; the last is filled up with rows of weight 0.

    Prefix blocks differ: each is as wide as its micro-batch's longest prefix, rounded up to a multiple of
    ``PREFIX_BUCKET`` (but no wider than the longest of the call needs), so that few widths occur.

    ``num_micro_batches``: make this many (more fillers), for schedules that need a fixed number; None makes as many as
    the rows fill. Raises ValueError if a prefix or a continuation is longer than its block.
    """
    layout = _layout(rows, shape, num_candidates)
    size = shape.micro_batch_size
    total = math.ceil(len(rows) / size) if num_micro_batches is None else num_micro_batches
    if total * size < len(rows):
        raise ValueError(f"{len(rows)} rows do not fit into {total} micro-batches of {size}")
    filler = Row(np.zeros(1, dtype=np.int64), (_NO_TOKENS,) * num_candidates, weight=0.0)
    padded = [*rows, *[filler] * (total * size - len(rows))]
    # All micro-batches of a call carry the same fields, so that the schedule's ranks agree on what they receive.
    sampled = any(r.sampling_log_probs is not None for r in rows)
    advantages = any(r.advantages is not None for r in rows)
    parts = [padded[start : start + size] for start in range(0, len(padded), size)]
    return tuple(_micro_batch(part, _fitted(layout, part, shape), sampled, advantages) for part in parts)


def _fitted(layout: RowLayout, rows: Sequence[Row], shape: RowShape) -> RowLayout:
    """The call's layout with a prefix block for these rows alone."""
    if shape.prefix_block is not None:
        return layout
    longest = max(len(row.prefix) for row in rows)
    width = _aligned(-(-longest // PREFIX_BUCKET) * PREFIX_BUCKET, layout, shape)
    return replace(layout, prefix_block=min(width, layout.prefix_block))


def _aligned(prefix_block: int, layout: RowLayout, shape: RowShape) -> int:
    blocks = layout.num_candidates * layout.candidate_block
    return prefix_block + -(prefix_block + blocks) % shape.pad_multiple


def _preferred(preference: Preference, picks: tuple[int | None, ...]) -> Row:
    group = preference.group
    taught = preference.weight != 0 and all(pick is not None for pick in picks)
    candidates = tuple(group.candidates[pick] for pick in picks if pick is not None) if taught else ()
    return _row(group.sample.prefix, candidates, len(picks), weight=preference.weight if taught else 0.0)


def _row(
    prefix: IntArray,
    candidates: Sequence[Candidate],
    num_candidates: int,
    weight: float,
    advantages: FloatArray | None = None,
) -> Row:
    """A row of no candidates is all padding after its prefix."""
    if not candidates:
        return Row(prefix, (_NO_TOKENS,) * num_candidates, weight=0.0)
    sampled = tuple(c.sampling_log_probs for c in candidates)
    return Row(
        prefix,
        tuple(c.tokens for c in candidates),
        weight,
        None if all(values is None for values in sampled) else sampled,
        advantages,
    )


def _layout(rows: Sequence[Row], shape: RowShape, num_candidates: int) -> RowLayout:
    longest = max((len(row.prefix) for row in rows), default=1)
    prefix_block = longest if shape.prefix_block is None else shape.prefix_block
    if longest > prefix_block:
        raise ValueError(f"a prefix of {longest} tokens does not fit a prefix block of {prefix_block}")
    for row in rows:
        lengths = [len(tokens) for tokens in row.continuations]
        if len(lengths) != num_candidates or max(lengths) > shape.candidate_block or not len(row.prefix):
            raise ValueError(
                f"a row with a prefix of {len(row.prefix)} and continuations of {lengths} tokens does not fit "
                f"{num_candidates} blocks of {shape.candidate_block} behind a prefix of at least 1 token"
            )
    layout = RowLayout(prefix_block, num_candidates, shape.candidate_block)
    return replace(layout, prefix_block=_aligned(prefix_block, layout, shape))


def _micro_batch(rows: Sequence[Row], layout: RowLayout, sampled: bool, advantages: bool) -> RowBatch:
    num_rows, block, num_candidates = len(rows), layout.candidate_block, layout.num_candidates
    tokens = np.zeros((num_rows, layout.length), dtype=np.int64)
    positions = np.zeros((num_rows, layout.length), dtype=np.int64)
    targets = np.zeros((num_rows, layout.num_scored), dtype=np.int64)
    sources = np.zeros((num_rows, layout.num_scored), dtype=np.int64)
    mask = np.zeros((num_rows, layout.num_scored), dtype=np.float32)
    sampling = np.zeros((num_rows, layout.num_scored), dtype=np.float32)
    for index, row in enumerate(rows):
        prefix_length = len(row.prefix)
        tokens[index, :prefix_length] = row.prefix
        positions[index, : layout.prefix_block] = np.arange(layout.prefix_block)
        for c, continuation in enumerate(row.continuations):
            start, scored, length = layout.prefix_block + c * block, c * block, len(continuation)
            tokens[index, start : start + length] = continuation
            positions[index, start : start + block] = prefix_length + np.arange(block)
            targets[index, scored : scored + length] = continuation
            # The state before a token predicts it; before a candidate's first token stands the prefix's last.
            sources[index, scored : scored + block] = start - 1 + np.arange(block)
            sources[index, scored] = prefix_length - 1
            mask[index, scored : scored + length] = 1.0
            known = row.sampling_log_probs[c] if row.sampling_log_probs is not None else None
            sampling[index, scored : scored + length] = np.nan if known is None else known
    advantage = np.zeros((num_rows, num_candidates), dtype=np.float32)
    for index, row in enumerate(rows):
        if row.advantages is not None:
            advantage[index] = row.advantages
    return RowBatch(
        layout=layout,
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        prefix_lengths=torch.tensor([len(row.prefix) for row in rows], dtype=torch.int64),
        targets=torch.from_numpy(targets),
        sources=torch.from_numpy(sources),
        mask=torch.from_numpy(mask),
        weights=torch.tensor([row.weight for row in rows], dtype=torch.float32),
        sampling_log_probs=torch.from_numpy(sampling) if sampled else None,
        advantages=torch.from_numpy(advantage) if advantages else None,
    )
