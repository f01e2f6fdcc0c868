"""Fuzzed input: whatever a file holds, every line is accounted for, or the error names file and line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import zstandard

from megatron_sip.data.encode import LineEncoder
from megatron_sip.data.progress import PreprocessReport
from megatron_sip.data.readers import ReadConfig, read_file
from megatron_sip.errors import DataError
from megatron_sip.tokenizer.base import Tokenizer, vocabulary_fingerprint
from tests.data.fuzz import fuzzed_file


class ByteTokenizer(Tokenizer):
    """A token per byte: refuses nothing that is text."""

    vocab_size = 257
    eod_id = 256
    fingerprint = vocabulary_fingerprint([b"bytes"], 256)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: object) -> str:
        return bytes(tokens).decode(errors="replace")  # type: ignore[call-overload]


def account(path: Path, rule: str) -> PreprocessReport | str:
    """The counts of a file, or the message of its error."""
    read = ReadConfig(utf8_errors=rule, max_line_bytes=100_000)
    encoder = LineEncoder(ByteTokenizer(), ("text",), True, read)
    report = PreprocessReport()
    num_documents = 0
    try:
        for batch in read_file(path, read):
            encoded = encoder(batch)
            report.count(encoded, "skip", ("text",))
            num_documents += len(encoded.columns[0].lengths) + encoded.columns[0].num_empty
    except DataError as error:
        return str(error)
    assert num_documents == report.num_documents
    return report


def test_every_line_of_fuzzed_files_is_accounted_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(20261121)
    outcomes = {"counted": 0, "refused": 0, "broken lines": 0, "documents": 0}
    for number in range(300):
        lines, packed, suffix, is_damaged = fuzzed_file(rng)
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(packed)
        result = account(path, ("fail", "replace", "ignore")[number % 3])
        if isinstance(result, str):
            assert is_damaged, result
            assert re.match(rf"{re.escape(str(path))}: damaged or truncated after (line|row) \d+ \(", result)
            outcomes["refused"] += 1
            continue
        assert not is_damaged
        counted = result.num_documents + result.num_blank + result.num_errors
        assert counted == result.num_lines == len(lines)
        assert all(re.match(rf"{re.escape(str(path))}:\d+: ", error) for error in result.errors)
        outcomes["counted"] += 1
        outcomes["broken lines"] += result.num_errors
        outcomes["documents"] += result.num_documents
        path.unlink()
    assert min(outcomes.values()) > 20, outcomes


def test_an_intact_line_between_broken_ones_always_becomes_a_document(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    path = tmp_path / "a.jsonl"
    for _ in range(50):
        lines, _, _, _ = fuzzed_file(rng)
        good = json.dumps({"text": "intact"}).encode()
        mixed = [part for line in lines for part in (line, good)]
        path.write_bytes(b"\n".join(mixed) + b"\n")
        plain, alone = account(path, "fail"), None
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        alone = account(path, "fail")
        assert isinstance(plain, PreprocessReport) and isinstance(alone, PreprocessReport)
        assert plain.num_documents == alone.num_documents + len(lines)


def test_a_damaged_archive_never_passes_for_a_whole_one(tmp_path: Path) -> None:
    raw = b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(200))
    for suffix, packed in (
        (".gz", gzip.compress(raw)),
        (".zst", zstandard.ZstdCompressor(write_checksum=True).compress(raw)),
    ):
        path = tmp_path / f"a.jsonl{suffix}"
        for cut in range(1, len(packed), 7):
            path.write_bytes(packed[:cut])
            assert isinstance(account(path, "fail"), str), (suffix, cut)
