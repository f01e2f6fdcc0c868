"""The corpus files: equal to Megatron-Core's byte for byte, whole or not there, and checked when opened."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_sip.data.indexed import IndexedWriter, open_indexed, token_dtype
from megatron_sip.errors import DataError
from tests.data.corpora import write_corpus

DOCUMENTS = [[5, 6, 7], [8], list(range(100, 140)), [0, 999]]


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 128256])
def test_files_equal_those_of_megatron_core_byte_for_byte(tmp_path: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, size=n).tolist() for n in (1, 17, 300, 2, 64)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_corpus(tmp_path, documents, "ours", vocab_size)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_core_reads_what_is_written(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_corpus(tmp_path, DOCUMENTS))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS


def test_documents_of_several_sequences_are_read_as_one(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "multi.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6, 7]), [2])
    builder.finalize(str(tmp_path / "multi.idx"))
    corpus = open_indexed(str(tmp_path / "multi"), 1000)
    assert corpus.document_lengths.tolist() == [5, 2]
    assert corpus.document(0).tolist() == [1, 2, 3, 4, 5]
    assert corpus.document(1).tolist() == [6, 7]


def test_slices_of_documents_and_of_the_packed_stream(tmp_path: Path) -> None:
    corpus = open_indexed(write_corpus(tmp_path, DOCUMENTS), 1000, "sha256:a")
    assert corpus.num_documents == 4
    assert corpus.num_tokens == 46
    assert corpus.document(2, 10, 3).tolist() == [110, 111, 112]
    assert corpus.tokens(2, 3).tolist() == [7, 8, 100]
    with pytest.raises(IndexError, match="ends before"):
        corpus.document(0, 1, 3)


def test_token_type_changes_at_65500_ids_as_in_megatron() -> None:
    assert token_dtype(65499) is np.uint16
    assert token_dtype(65500) is np.int32


def test_an_exception_while_writing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), IndexedWriter(str(tmp_path / "c"), 1000) as writer:
        writer.add_document(np.array([1, 2]))
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_the_old_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_corpus(tmp_path, DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_sip.data.indexed.os.fsync", full)
    with pytest.raises(DataError, match=r"No space left on device after 6 bytes.*free space"):
        write_corpus(tmp_path, [[1, 2, 3]])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert open_indexed(prefix, 1000, "sha256:a").num_documents == 4


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path, DOCUMENTS)
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(DataError, match=r"corpus\.idx: no such file; write the corpus"):
        open_indexed(prefix, 1000)
    with pytest.raises(DataError, match=r"give the path without \.bin"):
        open_indexed(f"{prefix}.bin", 1000)


@pytest.mark.parametrize("num_cut", [1, 2, 60])
def test_a_truncated_bin_is_refused(tmp_path: Path, num_cut: int) -> None:
    prefix = write_corpus(tmp_path, DOCUMENTS)
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-num_cut])
    with pytest.raises(DataError, match=rf"corpus\.bin: {92 - num_cut} bytes where the index needs 92: truncated"):
        open_indexed(prefix, 1000, "sha256:a")


@pytest.mark.parametrize("num_kept", [0, 20, 34, 60])
def test_a_truncated_or_foreign_idx_is_refused(tmp_path: Path, num_kept: int) -> None:
    prefix = write_corpus(tmp_path, DOCUMENTS)
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:num_kept])
    with pytest.raises(DataError, match=r"corpus\.idx: (not a Megatron index|.*truncated)"):
        open_indexed(prefix, 1000)


def test_an_overflown_offset_is_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path, DOCUMENTS)
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    data[34 + 4 * 4 + 8 : 34 + 4 * 4 + 16] = np.int64(-(2**31)).tobytes()  # the second sequence's byte offset
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="offsets do not follow"):
        open_indexed(prefix, 1000)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the corpus is empty \(0 documents, no token\)"):
        open_indexed(write_corpus(tmp_path, []), 1000)


def test_a_corpus_of_another_tokenizer_is_refused_by_its_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"made with another tokenizer \(NullTokenizer, 1000 ids, sha256:a; this run"):
        open_indexed(write_corpus(tmp_path, DOCUMENTS), 1000, "sha256:b")


def test_ids_beyond_the_vocabulary_are_found_without_a_sidecar(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path, DOCUMENTS)
    Path(f"{prefix}.meta.json").unlink()
    with pytest.raises(DataError, match=r"token id 999 .* is not in the vocabulary of 500"):
        open_indexed(prefix, 500, "sha256:a")


def test_a_sidecar_of_another_run_is_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path, DOCUMENTS)
    path = Path(f"{prefix}.meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_documents": 3}))
    with pytest.raises(DataError, match="tells of 3 documents"):
        open_indexed(prefix, 1000, "sha256:a")
    path.write_text("{")
    with pytest.raises(DataError, match=r"meta\.json: damaged"):
        open_indexed(prefix, 1000, "sha256:a")
