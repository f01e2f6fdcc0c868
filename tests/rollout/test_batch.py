"""Covers the host's bookkeeping: which requests are decoded together, which rows leave, what comes out."""

from typing import Any

import numpy as np
import pytest

from megatron_sip.rollout.batch import RolloutBatch
from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.rollout.protocol import GenerationRequest, SeedKey
from megatron_sip.rollout.queue import RequestQueue


def request(
    prefix_length: int = 3, num_rollouts: int = 2, limit: int = 4, greedy: bool = False, **options: object
) -> GenerationRequest:
    return GenerationRequest(
        sample_id=0,
        prefix=np.ones(prefix_length, dtype=np.int64),
        num_rollouts=num_rollouts,
        max_new_tokens=limit,
        seed_key=SeedKey(0, 0),
        greedy=greedy,
        **options,  # type: ignore[arg-type]
    )


def everything(requests: list[GenerationRequest], max_rows: int) -> list[list[int]]:
    """What an empty batch is given, time after time."""
    queue, taken = RequestQueue(requests), []
    while queue:
        taken.append(queue.take(max_rows))
    return taken


def test_requests_of_like_length_stand_together_up_to_the_row_limit() -> None:
    requests = [request(length) for length in (5, 80, 7, 90, 6)]
    assert everything(requests, max_rows=4) == [[3, 1], [2, 4], [0]]


def test_a_request_larger_than_the_limit_is_a_batch_of_its_own() -> None:
    assert everything([request(num_rollouts=16), request(num_rollouts=16)], max_rows=8) == [[0], [1]]


def test_rows_count_the_idle_slots_of_smaller_requests() -> None:
    assert everything([request(9, 1), request(8, 1), request(7, 4)], max_rows=6) == [[0, 1], [2]]


def test_requests_sampled_in_different_ways_are_apart_and_those_for_nothing_left_out() -> None:
    cool = SamplingParameters(temperature=0.8)
    requests = [request(), request(greedy=True), request(), request(sampling=cool), request(num_rollouts=0)]
    assert sorted(everything(requests, max_rows=64)) == [[0, 2], [1], [3]]


def test_a_batch_is_refilled_by_what_fits_its_rows_its_memory_and_its_sampling() -> None:
    requests = [request(9), request(8), request(7), request(6, greedy=True)]
    queue = RequestQueue(requests)
    assert queue.take(max_rows=2) == [0]
    running = requests[0]
    assert queue.take(max_rows=1, max_cached=100, beside=running) == []  # two rollouts have no room in one row
    assert queue.take(max_rows=4, max_cached=15, beside=running) == []  # 8 prefix tokens and 2 x 4 new ones are 16
    assert queue.take(max_rows=4, max_cached=31, beside=running) == [1]  # for both, 2 x 8 + 4 x 4 = 32 are needed
    assert queue.take(max_rows=4, max_cached=100, beside=running) == [2]  # the next one is greedy
    assert queue.take(max_rows=4, max_cached=100, beside=running) == []
    assert queue.take(max_rows=4) == [3] and not queue


def columns(batch: RolloutBatch, steps: list[list[int]]) -> list[list[list[Any]]]:
    """What each rollout is given of one value per row and step."""
    table = np.full((len(steps), batch.num_rollouts + 1), -1)
    for position, values in enumerate(steps):
        table[position, batch.column_of_rows] = values
        batch.advance(np.array(values) == 0)
    return [[column.tolist() for column in rollouts] for rollouts in batch.by_request(table)]


def test_a_row_ends_with_what_ends_it_which_is_part_of_it_or_at_its_limit() -> None:
    batch = RolloutBatch([request(num_rollouts=2, limit=4), request(num_rollouts=1, limit=2)])
    assert batch.rollout_of_rows.tolist() == [0, 1, 2, 2]  # the second request's idle slot stands in for its rollout
    steps = [[1, 0, 3, 9], [4, 5, 6, 9], [7, 5, 5, 9], [8, 5, 5, 9]]
    assert columns(batch, steps) == [[[1, 4, 7, 8], [0]], [[3, 6]]]
    assert batch.finished


def test_without_an_end_token_rows_go_on_to_the_limit() -> None:
    batch = RolloutBatch([request(num_rollouts=1, limit=2)])
    batch.advance(None)
    assert not batch.finished
    batch.advance(None)
    assert batch.finished


def test_finished_rows_leave_when_enough_of_them_are_done() -> None:
    batch = RolloutBatch([request(num_rollouts=4) for _ in range(2)])
    batch.advance(np.array([False, True, False, False, False, False, False, False]))
    assert batch.compact() is None  # a group still needs all its slots
    batch.advance(np.array([False, False, True, False, True, True, True, True]))
    groups, slots = batch.compact() or pytest.fail("two of eight rows are left")
    assert groups.tolist() == [0] and slots.tolist() == [[0, 3]]
    assert batch.column_of_rows.tolist() == [0, 3]
    batch.advance(np.array([False, True]))
    batch.advance(np.array([True, False]))
    lengths = [[len(column) for column in rollouts] for rollouts in batch.by_request(np.zeros((4, 8)))]
    assert lengths == [[4, 1, 2, 3], [2, 2, 2, 2]]
