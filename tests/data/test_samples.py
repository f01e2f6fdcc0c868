"""Samples and their order: every chunk once per epoch, pure functions of (seed, epoch), blends by weight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_sip.data.indexed import IndexedCorpus, open_indexed
from megatron_sip.data.order import BlendOrder, draw, permute
from megatron_sip.data.samples import BlendedStream, NextTokenDataset, ShuffledStream, SuffixDataset
from megatron_sip.errors import DataError
from tests.data.corpora import numbered_documents, write_corpus

LENGTHS = [3, 4, 7, 8, 12, 21, 1]


def corpus_of(folder: Path, lengths: list[int], name: str = "corpus") -> IndexedCorpus:
    return open_indexed(write_corpus(folder, numbered_documents(lengths), name), 1000, "sha256:a")


def test_every_full_chunk_with_a_prefix_is_a_suffix_exactly_once_per_epoch(tmp_path: Path) -> None:
    dataset = SuffixDataset([corpus_of(tmp_path, LENGTHS)], suffix_length=4, max_prefix_length=8)
    expected = []
    for first, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False):
        # Chunk 0 has nothing before it; a rest shorter than 4 is no chunk.
        expected += [list(range(first + 4 * c, first + 4 * c + 4)) for c in range(1, length // 4)]
    stream = ShuffledStream(dataset, seed=7)
    for epoch in range(3):
        samples = [stream[epoch * len(dataset) + i] for i in range(len(dataset))]
        assert sorted(s.suffix.tolist() for s in samples) == sorted(expected)
        for sample in samples:
            # Tokens count on through the corpus, so the prefix must end where the suffix begins.
            begin = int(np.cumsum([0, *LENGTHS])[sample.document])
            assert sample.prefix.tolist() == list(range(max(begin, sample.suffix[0] - 8), sample.suffix[0]))


def test_min_prefix_and_min_suffix_length_decide_which_chunks_count(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [21])
    starts = [
        [dataset.get(i, 0, i).suffix.tolist() for i in range(len(dataset))]
        for dataset in (
            SuffixDataset([corpus], suffix_length=4, max_prefix_length=16, min_prefix_length=9),
            SuffixDataset([corpus], suffix_length=4, max_prefix_length=16, min_prefix_length=9, min_suffix_length=1),
        )
    ]
    assert starts[0] == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert starts[1] == [[12, 13, 14, 15], [16, 17, 18, 19], [20]]


def test_random_cuts_give_one_sample_per_long_document_anew_each_epoch(tmp_path: Path) -> None:
    dataset = SuffixDataset(
        [corpus_of(tmp_path, LENGTHS)],
        suffix_length=4,
        max_prefix_length=100,
        min_prefix_length=3,
        cut="random",
        seed=1,
    )
    stream = ShuffledStream(dataset, seed=1)
    cuts: Counter[int] = Counter()
    for epoch in range(200):
        samples = [stream[epoch * 4 + i] for i in range(4)]
        assert sorted(s.document for s in samples) == [2, 3, 4, 5]  # those of 7 tokens or more
        for sample in samples:
            assert len(sample.suffix) == 4
            assert np.diff(np.concatenate([sample.prefix, sample.suffix])).tolist() == [1] * (len(sample.prefix) + 3)
            if sample.document == 4:
                cuts[len(sample.prefix)] += 1
    # 12 tokens: 3..8 may precede a suffix of 4; 200 draws of 6 values, each expected 33 times.
    assert sorted(cuts) == [3, 4, 5, 6, 7, 8]
    assert min(cuts.values()) > 15


def test_several_corpora_are_one_dataset_with_documents_numbered_through(tmp_path: Path) -> None:
    corpora = [corpus_of(tmp_path, [8, 3], "one"), corpus_of(tmp_path, [5, 12], "two")]
    dataset = SuffixDataset(corpora, suffix_length=4, max_prefix_length=4)
    assert [(s.document, s.suffix.tolist()) for s in (dataset.get(i, 0, i) for i in range(len(dataset)))] == [
        (0, [4, 5, 6, 7]),
        (3, [9, 10, 11, 12]),
        (3, [13, 14, 15, 16]),
    ]


def test_documents_all_too_short_are_an_error_that_tells_the_lengths(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [3, 9, 5])
    for cut in ("chunk", "random"):
        with pytest.raises(DataError, match=r"a prefix of 8 and a suffix of 4 tokens need 12.* 3 to 9 \(median 5\)"):
            SuffixDataset([corpus], suffix_length=4, max_prefix_length=16, min_prefix_length=8, cut=cut)
    with pytest.raises(DataError, match=r"17 tokens do not fill one window of 17 \+ 1"):
        NextTokenDataset([corpus], 17)


def test_windows_make_every_token_a_target_once(tmp_path: Path) -> None:
    dataset = NextTokenDataset([corpus_of(tmp_path, LENGTHS)], seq_length=5)
    windows = [dataset.get(i, 0, i).tokens for i in range(len(dataset))]
    assert all(len(window) == 6 for window in windows)
    assert np.concatenate([window[1:] for window in windows]).tolist() == list(range(1, 56))  # 56 tokens: 11 windows


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_an_epoch_order_is_a_permutation_and_differs_by_seed_and_epoch(size: int) -> None:
    order = [permute(i, size, 3, 0) for i in range(size)]
    assert sorted(order) == list(range(size))
    if size >= 64:
        for other in ((3, 1), (4, 0)):
            same = sum(permute(i, size, *other) == order[i] for i in range(size))
            assert same < 10  # 1 expected of two random permutations


def test_an_epoch_order_has_no_visible_pattern() -> None:
    order = np.array([permute(i, 5000, 11, 2) for i in range(5000)])
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    # Quarters of the order against quarters of the values: 16 cells of 312.5, chi-square with 9 degrees of freedom.
    cells = np.histogram2d(np.arange(5000), order, bins=4)[0]
    assert ((cells - 312.5) ** 2 / 312.5).sum() < 30


def test_draws_are_uniform_and_within_their_range() -> None:
    counts = Counter(draw(5, 8, 1, i) for i in range(4000))
    assert sorted(counts) == [5, 6, 7, 8]
    assert all(900 < count < 1100 for count in counts.values())


def test_a_blend_keeps_its_weights_at_every_moment() -> None:
    weights = [0.5, 0.3, 0.2]
    order = BlendOrder(weights)
    counts = [0, 0, 0]
    for position in range(70_000):  # beyond one pattern of 65,536
        source, inner = order.locate(position)
        assert inner == counts[source]  # each source is read in order, without a gap
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight * (position + 1)) < 2


def test_a_tiny_weight_is_not_lost() -> None:
    order = BlendOrder([1.0, 1e-9])
    assert sum(order.locate(i)[0] for i in range(65_536)) == 1


def test_blended_samples_are_numbered_by_the_blend(tmp_path: Path) -> None:
    one = NextTokenDataset([corpus_of(tmp_path, [41], "one")], seq_length=4)
    two = NextTokenDataset(
        [open_indexed(write_corpus(tmp_path, [list(range(500, 581))], "two"), 1000, "sha256:a")], seq_length=4
    )
    blend = BlendedStream([ShuffledStream(one, 1), ShuffledStream(two, 2)], [3.0, 1.0])
    windows = [blend[i] for i in range(40)]
    assert [window.sample_id for window in windows] == list(range(40))
    assert sum(int(window.tokens[0]) >= 500 for window in windows) == 10
    assert blend.epoch_length == 13  # 10 windows at a share of ¾
