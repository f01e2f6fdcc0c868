"""tools/inspect_data.py: figures that agree with what training draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sip.data.card import corpus_cards, count_suffixes
from megatron_sip.data.config import DataConfig
from megatron_sip.data.indexed import IndexedCorpus
from megatron_sip.data.samples import SuffixDataset
from tests.data.corpora import numbered_documents, write_corpus

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_data.py"


def test_suffixes_of_a_document_are_counted_by_hand() -> None:
    lengths = np.array([3, 4, 7, 8, 11, 12, 14])
    whole = DataConfig(seq_length=64, suffix_length=4)
    assert count_suffixes(lengths, whole).tolist() == [0, 0, 0, 1, 1, 2, 2]
    short = DataConfig(seq_length=64, suffix_length=4, min_suffix_length=2)
    assert count_suffixes(lengths, short).tolist() == [0, 0, 1, 1, 2, 2, 3]
    late = DataConfig(seq_length=64, suffix_length=4, min_prefix_length=5)
    assert count_suffixes(lengths, late).tolist() == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("cut", ["chunk", "random"])
@pytest.mark.parametrize(("min_prefix", "min_suffix"), [(1, None), (3, 2), (9, 1)])
def test_the_card_counts_the_samples_that_training_draws(
    tmp_path: Path, cut: str, min_prefix: int, min_suffix: int | None
) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 40).tolist()
    corpus = IndexedCorpus(write_corpus(tmp_path, numbered_documents(lengths), vocab_size=5000), 5000)
    config = DataConfig(
        seq_length=32, suffix_length=4, min_prefix_length=min_prefix, min_suffix_length=min_suffix, sample_cut=cut
    )
    drawn = SuffixDataset(
        [corpus],
        suffix_length=4,
        max_prefix_length=28,
        min_prefix_length=min_prefix,
        min_suffix_length=min_suffix,
        cut=cut,
    )
    (card,) = corpus_cards([corpus], None, config)
    assert card.num_suffixes == len(drawn)
    assert card.num_windows == (sum(lengths) - 1) // 32
    assert sum(count for _, count in card.histogram) == 40
    assert card.quantiles[-1] == (1.0, max(lengths))


def test_the_tool_prints_the_card_draws_it_and_decodes_samples(tmp_path: Path) -> None:
    documents = [list(range(10, 30)), list(range(40, 45))]
    prefix = write_corpus(tmp_path, documents)
    (tmp_path / "corpus.meta.json").unlink()  # its tokenizer is not NullTokenizer's
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "999", "--suffix-length", "4", "--seq-length", "12"]
    plot = tmp_path / "lengths.svg"
    shown = subprocess.run(
        [sys.executable, str(TOOL), "--data-path", prefix, *flags, "--num-samples", "1", "--plot", str(plot)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "2 documents, 25 tokens" in shown
    assert "4 prefix/suffix samples of N = 4" in shown
    assert "1 documents are too short" in shown
    suffix = shown.split("suffix >>>")[1].split()
    assert suffix in [[str(first + i) for i in range(4)] for first in (14, 18, 22, 26)]
    assert plot.read_text().count('<rect class="length"') == 5  # 1, 2, 4, 8 and 16 tokens and more


def test_without_samples_to_decode_no_tokenizer_is_asked_for(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path, [list(range(10, 30)), list(range(40, 45))])

    def inspect(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *flags, "--suffix-length", "4", "--seq-length", "12"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "2 documents, 25 tokens" in inspect("--data-path", prefix, "--num-samples", "0").stdout
    (tmp_path / "corpus.meta.json").unlink()  # as of another tool
    assert "2 documents, 25 tokens" in inspect("--data-path", prefix, "--num-samples", "0").stdout
    # The corpus comes first: a tokenizer would be of no use without it.
    assert "gone.bin: no such file" in inspect("--data-path", str(tmp_path / "gone")).stderr
    asked = inspect("--data-path", prefix)
    assert asked.returncode == 1 and "give --num-samples 0" in asked.stderr and asked.stderr.count("\n") == 1
