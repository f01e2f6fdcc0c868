"""Covers the Philox bit stream and its addressing. Does not cover statistical quality: that is the generator's own."""

import numpy as np
import pytest

from megatron_sip.rollout.random import philox_4x32, token_uniforms

# Known answers from the Random123 distribution of the generator's authors (kat_vectors, philox4x32 10).
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    as_arrays = [tuple(np.array([word], dtype=np.uint64) for word in part) for part in (counter, key)]
    assert [int(word[0]) for word in philox_4x32(*as_arrays)] == words


def test_a_row_is_the_same_alone_and_among_others_and_for_fewer_tokens() -> None:
    samples, rollouts = np.arange(40) // 4, np.arange(40) % 4
    together = token_uniforms(7, 3, samples, rollouts, 33)
    for row in (0, 13, 39):
        alone = token_uniforms(7, 3, samples[row], rollouts[row], 5)
        np.testing.assert_array_equal(together[row, :5], alone[0])


def test_every_part_of_the_address_changes_the_numbers() -> None:
    address = np.array([5, 5, 5, 5])
    changed = address + np.eye(4, dtype=np.int64)
    rows = token_uniforms(*np.vstack([address, changed]).T, num_tokens=8)
    assert len(np.unique(rows)) == rows.size


def test_wide_and_negative_seeds_are_not_cut_to_32_bits() -> None:
    seeds = np.array([1, 1 + (1 << 32), -1, 0xFFFFFFFF])
    rows = token_uniforms(seeds, 0, 0, 0, 2)
    assert len(np.unique(rows)) == rows.size


def test_numbers_are_uniform_over_the_unit_interval() -> None:
    numbers = token_uniforms(1, 2, np.arange(500), 0, 200).ravel()
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert chi_square < 160.0  # 99 degrees of freedom: p = 1e-4
