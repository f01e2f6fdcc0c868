"""Covers ``--candidates``, the order within a group, the options and the rollout statistics."""

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.rollout.candidates import CandidatePool, build_group
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.rollout.statistics import rollout_scalars, rollout_sums
from megatron_sip.types import Candidate, CandidateKind, Sample

SAMPLE = Sample(sample_id=4, document=0, prefix=np.array([1, 2]), suffix=np.array([3, 4, 5]))


def rollout(number: int, *tokens: int) -> Candidate:
    return Candidate(CandidateKind.ROLLOUT, np.array(tokens), rollout=number)


@pytest.mark.parametrize(
    ("text", "pool"),
    [
        ("suffix", CandidatePool(True, False, 0)),
        ("rollout:1", CandidatePool(False, False, 1)),
        ("rollout", CandidatePool(False, False, 1)),
        ("rollout:4, suffix", CandidatePool(True, False, 4)),
        ("suffix,rewrite,rollout:16", CandidatePool(True, True, 16)),
    ],
)
def test_pools_of_the_papers_variants_parse(text: str, pool: CandidatePool) -> None:
    assert CandidatePool.parse(text) == pool
    assert CandidatePool.parse(str(pool)) == pool
    assert len(pool.kinds) == pool.num_candidates


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "''"),
        ("suffixes", "'suffixes'"),
        ("suffix,suffix", "suffix twice"),
        ("suffix:2", "drop ':2'"),
        ("rollout:0", "'rollout:0'"),
        ("rollout:-3", "'rollout:-3'"),
        ("rollout:many", "'rollout:many'"),
    ],
)
def test_a_broken_pool_is_refused_with_the_entry_and_a_remedy(text: str, found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        RolloutConfig(candidates=text).validate()


def test_a_group_is_in_the_order_suffix_rewrite_rollouts() -> None:
    pool = CandidatePool.parse("suffix,rewrite,rollout:2")
    group = build_group(SAMPLE, pool, [rollout(0, 7), rollout(1, 8)], rewrite=np.array([6]))
    assert [(candidate.kind.value, candidate.tokens.tolist()) for candidate in group.candidates] == [
        ("suffix", [3, 4, 5]),
        ("rewrite", [6]),
        ("rollout", [7]),
        ("rollout", [8]),
    ]


def test_a_group_without_its_rewrite_is_one_smaller() -> None:
    pool = CandidatePool.parse("suffix,rewrite")
    assert [candidate.kind for candidate in build_group(SAMPLE, pool).candidates] == [CandidateKind.SUFFIX]
    assert len(build_group(SAMPLE, pool, rewrite=np.array([], dtype=np.int64)).candidates) == 1


@pytest.mark.parametrize("options", [{"rollout_max_new_tokens": 0}, {"rollout_batch_size": 0}, {"rollout_top_k": -1}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="--" + next(iter(options)).replace("_", "-")):
        RolloutConfig(**options).validate()


def test_statistics_are_ratios_of_summed_counts() -> None:
    # 1 2 3 1 2 3 has the trigrams 123 231 312 123: one of four stood before. Two tokens have none.
    rollouts = [rollout(0, 1, 2, 3, 1, 2, 3), rollout(1, 9, 0)]
    assert rollout_scalars(rollout_sums(rollouts, eod=0), seconds=2.0) == {
        "rollout/tokens_per_s": 4.0,
        "rollout/length": 4.0,
        "rollout/repetition": 0.25,
        "rollout/eod_rate": 0.5,
    }


def test_no_rollouts_give_no_scalars() -> None:
    assert rollout_scalars(rollout_sums([], eod=0), seconds=1.0) == {}
