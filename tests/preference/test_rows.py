"""Covers the row layout against rows written out by hand, and its use: the state at ``sources`` precedes the target."""

import numpy as np
import pytest

from megatron_sip.preference import (
    PreferenceConfig,
    Row,
    RowShape,
    build_rows,
    candidate_rows,
    chosen_rows,
    group_rows,
    longest_first,
    pair_rows,
    select,
)
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Judgment, Sample


def array(values, dtype=np.int64):
    return np.array(values, dtype=dtype)


def make_group(prefix, *continuations, log_probs=False):
    kinds = [CandidateKind.SUFFIX] + [CandidateKind.ROLLOUT] * (len(continuations) - 1)
    candidates = tuple(
        Candidate(
            kind,
            array(tokens),
            sampling_log_probs=array([-float(t) for t in tokens], np.float32) if log_probs else None,
        )
        for kind, tokens in zip(kinds, continuations, strict=True)
    )
    return CandidateGroup(Sample(0, 0, array(prefix), array(continuations[0])), candidates)


def preferences(groups, scores):
    judgments = [Judgment(array(s, np.float64), {}) for s in scores]
    return select(groups, judgments, PreferenceConfig())


def test_a_pair_of_ragged_rows_is_laid_out_as_by_hand():
    groups = [make_group([11, 12, 13], [21, 22], [31, 32, 33]), make_group([14], [24], [34, 35])]
    shape = RowShape(micro_batch_size=2, candidate_block=3)
    (batch,) = pair_rows(preferences(groups, [[0.0, 1.0], [1.0, 0.0]]), shape)
    assert (batch.layout.prefix_block, batch.layout.num_candidates, batch.layout.candidate_block) == (3, 2, 3)
    #        prefix      chosen      rejected
    assert batch.tokens.tolist() == [
        [11, 12, 13, 31, 32, 33, 21, 22, 0],
        [14, 0, 0, 24, 0, 0, 34, 35, 0],
    ]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5], [0, 1, 2, 1, 2, 3, 1, 2, 3]]
    assert batch.prefix_lengths.tolist() == [3, 1]
    assert batch.targets.tolist() == [[31, 32, 33, 21, 22, 0], [24, 0, 0, 34, 35, 0]]
    assert batch.sources.tolist() == [[2, 3, 4, 2, 6, 7], [0, 3, 4, 0, 6, 7]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 0]]
    assert batch.weights.tolist() == [1, 1]
    assert batch.sampling_log_probs is None


def test_every_target_follows_the_token_at_its_source():
    """In a row's own sequence (prefix + continuation) the token after the source's is the target."""
    rng = np.random.default_rng(0)
    rows = [
        Row(rng.integers(1, 99, rng.integers(1, 7)), tuple(rng.integers(1, 99, rng.integers(1, 5)) for _ in range(3)))
        for _ in range(5)
    ]
    for number, batch in enumerate(build_rows(rows, RowShape(1, 4, pad_multiple=8), num_candidates=3)):
        row, layout = rows[number], batch.layout
        assert layout.length % 8 == 0
        for c, continuation in enumerate(row.continuations):
            sequence = [*row.prefix, *continuation]
            for t, token in enumerate(continuation):
                at = c * 4 + t
                source, target = int(batch.sources[0, at]), int(batch.targets[0, at])
                assert target == token
                assert int(batch.tokens[0, source]) == sequence[len(row.prefix) + t - 1]
                assert int(batch.positions[0, source]) == len(row.prefix) + t - 1


def test_all_micro_batches_of_a_call_have_one_shape_and_fillers_weigh_nothing():
    rows = [Row(array([1] * n), (array([2]),)) for n in (2, 5, 3)]
    batches = build_rows(rows, RowShape(2, 4, pad_multiple=4), num_candidates=1, num_micro_batches=3)
    assert [b.tokens.shape for b in batches] == [(2, 12)] * 3, "5 + 4 rounded up to a multiple of 4"
    assert [b.weights.tolist() for b in batches] == [[1, 1], [1, 0], [0, 0]]
    assert batches[2].mask.sum() == 0
    assert batches[2].prefix_lengths.tolist() == [1, 1]


def test_a_fixed_prefix_block_makes_shapes_equal_across_calls():
    shape = RowShape(1, 4, prefix_block=9, pad_multiple=8)
    widths = {build_rows([Row(array([1] * n), (array([2]),))], shape, 1)[0].layout.length for n in (1, 9)}
    assert widths == {16}


def test_a_preference_that_teaches_nothing_keeps_its_place_with_weight_zero():
    groups = [make_group([1], [2], [3]), make_group([1], [2], [3])]
    shape = RowShape(2, 2)
    for build in (pair_rows, chosen_rows):
        (batch,) = build(preferences(groups, [[0.5, 0.5], [0.0, 1.0]]), shape)
        assert batch.weights.tolist() == [0, 1]
        assert batch.mask[0].sum() == 0
        assert batch.mask[1].sum() == batch.layout.num_candidates


def test_the_chosen_alone_is_the_row_of_rf_nll():
    (batch,) = chosen_rows(preferences([make_group([1], [2], [3, 4])], [[0.0, 1.0]]), RowShape(1, 2))
    assert batch.tokens.tolist() == [[1, 3, 4]]


def test_streams_without_a_preference_pick_their_candidate():
    groups = [make_group([1], [2], [3]), make_group([5], [6], [7])]
    (batch,) = candidate_rows(groups, [1, None], RowShape(2, 1))
    assert batch.tokens.tolist() == [[1, 3], [5, 0]]
    assert batch.weights.tolist() == [1, 0]


def test_group_rows_carry_sampling_log_probs_and_advantages():
    groups = [make_group([1, 2], [3], [4, 5], log_probs=True)]
    advantages = [array([0.5, -0.5], np.float32)]
    (batch,) = group_rows(groups, RowShape(1, 2), advantages)
    assert batch.sampling_log_probs is not None
    assert batch.sampling_log_probs.tolist() == [[-3, 0, -4, -5]]
    assert batch.advantages is not None
    assert batch.advantages.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row(array([1, 2, 3]), (array([1]),)), "prefix of 3 tokens"),
        (Row(array([1]), (array([1, 2, 3]),)), r"continuations of \[3\]"),
        (Row(array([]), (array([1]),)), "prefix of 0"),
    ],
)
def test_what_does_not_fit_its_block_is_refused(row, words):
    with pytest.raises(ValueError, match=words):
        build_rows([row], RowShape(1, 2, prefix_block=2), num_candidates=1)


def test_more_rows_than_micro_batches_hold_are_refused():
    with pytest.raises(ValueError, match="3 rows do not fit into 1 micro-batches of 2"):
        build_rows([Row(array([1]), (array([1]),))] * 3, RowShape(2, 1), 1, num_micro_batches=1)


def test_prefix_blocks_fit_their_micro_batch_in_steps_of_64_and_the_longest_at_most():
    rows = [Row(array([1] * n), (array([2]), array([3]))) for n in (3, 70, 130, 1)]
    widths = [b.layout.prefix_block for b in build_rows(rows, RowShape(1, 4), num_candidates=2)]
    assert widths == [64, 128, 130, 64]
    divisible = build_rows(rows, RowShape(2, 3, pad_multiple=4), num_candidates=2)
    assert [b.layout.length for b in divisible] == [136, 136], "128 + 6 and 130 + 6, rounded up to a multiple of 4"


def test_real_tokens_are_those_of_rows_that_teach_with_each_prefix_once():
    rows = [Row(array([1] * 5), (array([2, 3]), array([4]))), Row(array([1] * 2), (array([2]), array([3])), weight=0.0)]
    (batch,) = build_rows(rows, RowShape(2, 4), num_candidates=2)
    assert int(batch.num_real_tokens()) == 5 + 2 + 1


def test_rows_in_order_of_their_prefixes_lengths_need_less_padding() -> None:
    rows = [Row(np.ones(length, dtype=np.int64), (np.ones(8, dtype=np.int64),)) for length in (64, 128, 64, 128)]
    order = longest_first([row.prefix for row in rows])
    assert order == [1, 3, 0, 2]  # those of equal length as they were
    shape = RowShape(micro_batch_size=2, candidate_block=8)
    drawn, sorted_ = (build_rows(part, shape, 1) for part in (rows, [rows[index] for index in order]))
    assert sum(batch.tokens.numel() for batch in drawn) == 4 * 136
    assert sum(batch.tokens.numel() for batch in sorted_) == 2 * 136 + 2 * 72
