"""The planner packs rows and batches as the trainer does."""

from __future__ import annotations

import numpy as np

from megatron_sip.preference.rows import Row, RowShape, build_rows
from megatron_sip.rollout import GenerationRequest, SeedKey
from megatron_sip.rollout.queue import RequestQueue
from megatron_sip.train.plan.lengths import PrefixLengths, candidate_rows, rollout_batches

LENGTHS = [5, 200, 64, 65, 130, 12, 199, 3, 77]


def test_micro_batches_are_as_wide_as_those_of_training() -> None:
    tokens = np.ones(8, dtype=np.int64)
    rows = [Row(np.ones(length, dtype=np.int64), (tokens, tokens)) for length in LENGTHS]
    batches = build_rows(rows, RowShape(micro_batch_size=2, candidate_block=8), num_candidates=2)
    planned = list(candidate_rows(LENGTHS, 2, 2, 8))
    assert [batch.tokens.numel() for batch in batches] == [part.tokens for part in planned]
    # The last one has a row of 77 and a filler.
    assert planned[-1].attended == 77 / 2


def test_rollout_batches_are_cut_like_the_engines() -> None:
    requests = [
        GenerationRequest(number, np.ones(length, dtype=np.int64), 3, 8, SeedKey(0, 0))
        for number, length in enumerate(LENGTHS)
    ]
    queue, cut = RequestQueue(requests), []
    while queue:
        cut.append(queue.take(max_rows=12))
    expected = [(len(batch), max(LENGTHS[index] for index in batch)) for batch in cut]
    assert list(rollout_batches(LENGTHS, max_groups=4)) == expected


def test_lengths_begin_again() -> None:
    assert PrefixLengths((3, 5), "").take(5) == [3, 5, 3, 5, 3]
    assert PrefixLengths((3, 5), "").mean == 4
