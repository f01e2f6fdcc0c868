"""Covers the host's bookkeeping: which requests are decoded together, which rows leave, what comes out."""

import numpy as np
import pytest

from megatron_sip.rollout.batch import RolloutBatch, plan_batches
from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.rollout.protocol import GenerationRequest, SeedKey

EOD = 9


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


def test_requests_of_like_length_stand_together_up_to_the_row_limit() -> None:
    requests = [request(length) for length in (5, 80, 7, 90, 6)]
    assert plan_batches(requests, max_rows=4) == [[3, 1], [2, 4], [0]]


def test_a_request_larger_than_the_limit_is_a_batch_of_its_own() -> None:
    assert plan_batches([request(num_rollouts=16), request(num_rollouts=16)], max_rows=8) == [[0], [1]]


def test_rows_count_the_idle_slots_of_smaller_requests() -> None:
    assert plan_batches([request(9, 1), request(8, 1), request(7, 4)], max_rows=6) == [[0, 1], [2]]


def test_requests_sampled_in_different_ways_are_apart() -> None:
    cool = SamplingParameters(temperature=0.8)
    requests = [request(), request(greedy=True), request(), request(sampling=cool)]
    assert sorted(plan_batches(requests, max_rows=64)) == [[0, 2], [1], [3]]


def test_a_row_ends_with_eod_which_is_part_of_it_or_at_its_limit() -> None:
    batch = RolloutBatch([request(num_rollouts=2, limit=4), request(num_rollouts=1, limit=2)], EOD)
    assert batch.rollout_of_rows.tolist() == [0, 1, 2, 2]  # the second request's idle slot stands in for its rollout
    for tokens in ([1, EOD, 3, 0], [4, 5, 6, 0], [7, 5, 5, 0], [8, 5, 5, 0]):
        assert not batch.finished
        batch.accept(np.array(tokens))
    assert batch.finished
    assert [[tokens.tolist() for tokens in rollouts] for rollouts in batch.results()] == [
        [[1, 4, 7, 8], [EOD]],
        [[3, 6]],
    ]


def test_without_an_end_token_rows_go_on_to_the_limit() -> None:
    batch = RolloutBatch([request(num_rollouts=1, limit=2)], None)
    batch.accept(np.array([EOD]))
    batch.accept(np.array([EOD]))
    assert [tokens.tolist() for tokens in batch.results()[0]] == [[EOD, EOD]]


def test_finished_rows_leave_when_enough_of_them_are_done() -> None:
    batch = RolloutBatch([request(num_rollouts=4) for _ in range(2)], EOD)
    batch.accept(np.array([1, EOD, 1, 1, 1, 1, 1, 1]))
    assert batch.compact() is None  # a group still needs all its slots
    batch.accept(np.array([2, 0, EOD, 2, EOD, EOD, EOD, EOD]))
    groups, slots = batch.compact() or pytest.fail("two of eight rows are left")
    assert groups.tolist() == [0] and slots.tolist() == [[0, 3]]
    batch.accept(np.array([3, EOD]))
    batch.accept(np.array([EOD, 0]))
    assert [tokens.tolist() for tokens in batch.results()[0]] == [[1, 2, 3, EOD], [EOD], [1, EOD], [1, 2, EOD]]
