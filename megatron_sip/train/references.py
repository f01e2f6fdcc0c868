"""Log-probs under the reference policy: of the rows that are trained on, or of all candidates before the verdicts.

Shape legend: B rows of a micro-batch, L scored positions of a row, T width of a candidate block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_sip.engine.engine import REFERENCE, Engine
from megatron_sip.preference.rows import Row, RowShape, build_rows, longest_first
from megatron_sip.types import CandidateGroup, Preference, RowBatch

CandidateScores = list[list[torch.Tensor]]
"""Per group and candidate: float32 [T], padded at the right."""


def with_reference(engine: Engine, batches: Sequence[RowBatch]) -> tuple[RowBatch, ...]:
    """The batches with ``reference_log_probs`` [B, L]. Collective over the replica."""
    scored = engine.score(batches, which=REFERENCE)
    return tuple(replace(batch, reference_log_probs=own) for batch, own in zip(batches, scored, strict=True))


def score_candidates(
    engine: Engine, groups: Sequence[CandidateGroup], shape: RowShape, num_candidates: int, trained_candidates: int
) -> CandidateScores:
    """All candidates of all groups, before it is known which of them are trained on. Collective over the replica.

    A row holds as many of a group's candidates as a micro-batch of training, of ``trained_candidates`` to a row, has in
    all: no more memory is needed than there. ``num_candidates``: of a full group.
    """
    room = shape.micro_batch_size * trained_candidates
    per_row = min(num_candidates, room)
    places: list[tuple[int, int]] = []
    rows = []
    for number, group in enumerate(groups):
        for first in range(0, num_candidates, per_row):
            tokens = [c.tokens for c in group.candidates[first : first + per_row]]
            padding = [np.zeros(0, dtype=np.int64)] * (per_row - len(tokens))
            rows.append(Row(group.sample.prefix, (*tokens, *padding)))
            places.append((number, first))
    order = longest_first([row.prefix for row in rows])
    rows, places = [rows[index] for index in order], [places[index] for index in order]
    batches = build_rows(rows, replace(shape, micro_batch_size=max(1, room // per_row)), per_row)
    log_probs = torch.cat(engine.score(batches, which=REFERENCE))[: len(rows)]
    scores: CandidateScores = [[] for _ in groups]
    for (number, first), row in zip(places, log_probs, strict=True):
        held = len(groups[number].candidates) - first
        scores[number] += row.split(shape.candidate_block)[: max(0, min(per_row, held))]
    return scores


def from_scores(
    batches: Sequence[RowBatch], preferences: Sequence[Preference], scores: CandidateScores
) -> tuple[RowBatch, ...]:
    """The batches of ``preferences`` with ``reference_log_probs`` out of ``score_candidates``."""
    done = []
    block, size = batches[0].layout.candidate_block, batches[0].num_rows
    for number, batch in enumerate(batches):
        filled = torch.zeros_like(batch.mask)
        for row, preference in enumerate(preferences[number * size : (number + 1) * size]):
            for place, pick in enumerate(_trained(preference)):
                own = scores[number * size + row][pick]
                filled[row, place * block : (place + 1) * block] = own.to(filled.device)
        done.append(replace(batch, reference_log_probs=filled * batch.mask))
    return tuple(done)


def kl_to_reference(preferences: Sequence[Preference], batches: Sequence[RowBatch]) -> float:
    """Nats per token: mean of (sampling - reference) log-prob over the rollouts that were chosen or rejected.

    An estimate of KL(policy || reference), unbiased if the judge's choice has nothing to do with the ratio; NaN if no
    rollout was chosen or rejected.
    """
    total, count = 0.0, 0
    block = batches[0].layout.candidate_block
    references = torch.cat([batch.reference_log_probs for batch in batches if batch.reference_log_probs is not None])
    references = references.double().cpu()
    for row, preference in enumerate(preferences):
        for place, pick in enumerate(_trained(preference)):
            sampled = preference.group.candidates[pick].sampling_log_probs
            if sampled is not None:
                reference = references[row, place * block : place * block + len(sampled)]
                total += float(sampled.sum(dtype=np.float64)) - float(reference.sum())
                count += len(sampled)
    return total / count if count else math.nan


def _trained(preference: Preference) -> list[int]:
    """Candidates of the preference's row, in their blocks' order."""
    picks = (preference.chosen, preference.rejected)
    return [pick for pick in picks if pick is not None] if preference.weight else []
