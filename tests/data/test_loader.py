"""The loader: exact resume, the same samples at every data-parallel size; batches of next-token rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sip.data.batches import next_token_batches
from megatron_sip.data.build import build_loader, open_corpora
from megatron_sip.data.config import DataConfig, parse_blend
from megatron_sip.data.loader import SampleLoader
from megatron_sip.data.samples import Window
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from tests.data.corpora import numbered_documents, write_corpus

CONFIG = DataConfig(seq_length=16, suffix_length=4, min_prefix_length=4)


def null_tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=999))


def corpus_path(folder: Path, lengths: list[int], name: str = "corpus") -> str:
    return write_corpus(folder, numbered_documents(lengths), name, 1000, null_tokenizer().fingerprint)


def loader_over(path: str, **changes: Any) -> SampleLoader:
    values = {**CONFIG.__dict__, **changes}
    return build_loader(DataConfig(**values), [path], null_tokenizer(), seed=5)


def signature(samples: list[Any]) -> list[tuple[int, ...]]:
    return [
        (s.sample_id, *(s.tokens if isinstance(s, Window) else np.concatenate([s.prefix, [-1], s.suffix])))
        for s in samples
    ]


def test_the_union_over_ranks_is_the_global_slice_at_every_dp_size(tmp_path: Path) -> None:
    path = corpus_path(tmp_path, [30, 50, 70, 100])
    for stream in ("ntp", "sip"):
        whole = loader_over(path)
        expected = signature(whole.take(stream, 12) + whole.take(stream, 9))
        for dp_size in (1, 2, 3, 4):
            loaders = [loader_over(path) for _ in range(dp_size)]
            parts = [
                signature(loader.take(stream, count, rank, dp_size))
                for count in (12, 9)
                for rank, loader in enumerate(loaders)
            ]
            assert [sample for part in parts for sample in part] == expected
            assert all(len(part) == 12 // dp_size for part in parts[:dp_size])


def test_a_resumed_loader_goes_on_exactly_also_at_another_dp_size(tmp_path: Path) -> None:
    path = corpus_path(tmp_path, [30, 50, 70, 100])
    straight = loader_over(path)
    first, second = loader_over(path), loader_over(path)
    for _ in range(10):
        straight.take("ntp", 4)
        straight.take("sip", 6)
        first.take("ntp", 4, 1, 2)
        first.take("sip", 6, 1, 2)
    second.load_state_dict(first.state_dict())
    assert second.consumed == {"ntp": 40, "sip": 60}
    assert second.consumed_samples == 100
    for stream in ("sip", "ntp"):
        assert signature(second.take(stream, 25)) == signature(straight.take(stream, 25))


def test_peek_consumes_nothing(tmp_path: Path) -> None:
    loader = loader_over(corpus_path(tmp_path, [100]))
    ahead = signature(loader.peek("sip", 3))
    assert loader.consumed["sip"] == 0
    assert signature(loader.take("sip", 3)) == ahead


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_length": 20}, "--seq-length is 20 and was 16;"),
        ({"suffix_length": 5}, "--suffix-length is 5 and was 4, --min-suffix-length is 5 and was 4;"),
        ({"data_seed": 6}, "the seed (--data-seed, else --seed) is 6 and was 5;"),
        (
            {"sample_cut": "random", "min_prefix_length": 8},
            "--min-prefix-length is 8 and was 4, --sample-cut is random",
        ),
    ],
)
def test_resume_with_another_order_is_refused_and_says_what_differs(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = corpus_path(tmp_path, [60, 60])
    state = loader_over(path).state_dict()
    with pytest.raises(DataError, match="is not the one of the checkpoint: " + re.escape(said)):
        loader_over(path, **changes).load_state_dict(state)


def test_resume_with_another_corpus_or_other_weights_says_so_and_a_moved_corpus_is_the_same(tmp_path: Path) -> None:
    one, two = corpus_path(tmp_path, [60, 60], "one"), corpus_path(tmp_path, [90], "two")

    def blend(*words: str) -> SampleLoader:
        return build_loader(CONFIG, words, null_tokenizer(), seed=5)

    with pytest.raises(
        DataError,
        match=re.escape("--data-path is two (1 documents, 90 tokens) and was one (2 documents, 120 tokens);"),
    ):
        blend(two).load_state_dict(blend(one).state_dict())
    with pytest.raises(DataError, match=r"--data-path is 1 one \(.*\) \+ 1 two \(.* and was 3 one \(.*\) \+ 1 two \("):
        blend("1", one, "1", two).load_state_dict(blend("3", one, "1", two).state_dict())
    (tmp_path / "elsewhere").mkdir()
    blend(corpus_path(tmp_path / "elsewhere", [60, 60], "one")).load_state_dict(blend(one).state_dict())


def test_a_weighted_blend_is_built_from_megatrons_notation(tmp_path: Path) -> None:
    one, two = corpus_path(tmp_path, [60, 60], "one"), corpus_path(tmp_path, [90], "two")
    loader = build_loader(CONFIG, ["3", one, "1", two], null_tokenizer(), seed=5)
    samples = loader.take("sip", 400)
    assert sum(sample.document == 2 for sample in samples) == 100  # the third document is the second corpus
    assert [sample.sample_id for sample in samples] == list(range(400))


def test_documents_too_short_for_suffixes_still_serve_next_token_runs(tmp_path: Path) -> None:
    path = corpus_path(tmp_path, [6] * 20)
    with pytest.raises(DataError, match="no document is long enough"):
        loader_over(path)
    loader = build_loader(CONFIG, [path], null_tokenizer(), 5, names=("ntp",))
    assert len(loader.take("ntp", 3)) == 3


def test_a_missing_path_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="--valid-data-path is missing"):
        open_corpora([], null_tokenizer(), "--valid-data-path")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("0.5", "a", "0.5"), "write 'weight path"),
        (("0.5", "a", "b", "0.5"), "write 'weight path"),
        (("a", "0.5"), "the weight 0.5 follows a path"),
        (("a", "a"), "given twice"),
        (("0", "a", "1", "b"), "must be a number above 0"),
    ],
)
def test_a_malformed_blend_is_refused(values: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_blend(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suffix_length": 16}, "--suffix-length 16 leaves no room"),
        ({"min_prefix_length": 13}, "--min-prefix-length 13 is more than the 12"),
        ({"min_suffix_length": 5}, "--min-suffix-length 5: must be 1 to --suffix-length 4"),
        ({"seq_length": 0}, "--seq-length 0: must be at least 1"),
        ({"sample_cut": "all"}, "--sample-cut all"),
    ],
)
def test_impossible_lengths_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DataConfig(**{**CONFIG.__dict__, **changes}).validate()


def test_next_token_rows_shift_targets_and_fill_up_with_weightless_rows() -> None:
    windows = [Window(i, np.array([10 * i + 1, 2, 9, 4, 5, 6])) for i in range(3)]
    batches = next_token_batches(windows, 2, pad_multiple=4, masked_eod_id=9)
    assert len(batches) == 2
    last = batches[1]
    assert (last.layout.length, last.layout.num_candidates, last.layout.num_scored) == (8, 0, 8)
    assert last.tokens.tolist() == [[21, 2, 9, 4, 5, 0, 0, 0], [0] * 8]
    assert last.targets.tolist() == [[2, 9, 4, 5, 6, 0, 0, 0], [0] * 8]
    assert last.mask.tolist() == [[1, 1, 0, 1, 1, 0, 0, 0], [0] * 8]
    assert last.weights.tolist() == [1.0, 0.0]
    assert last.sources.tolist() == [list(range(8))] * 2
    assert last.prefix_lengths.tolist() == [5, 5]
    assert last.mask.dtype == torch.float32
    more = next_token_batches(windows, 2, num_micro_batches=4)
    assert [batch.weights.tolist() for batch in more] == [[1, 1], [1, 0], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match="do not fit"):
        next_token_batches(windows, 1, num_micro_batches=2)
