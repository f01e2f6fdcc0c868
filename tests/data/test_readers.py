"""Readers: every kind of file, joined side files, fields by dotted path, rules for broken text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_sip.data.readers import ReadConfig, expand_inputs, read_batches, read_file
from megatron_sip.data.records import BrokenLine, Record, lookup, parse_batch
from megatron_sip.errors import ConfigurationError, DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

REDPAJAMA = ReadConfig(format="redpajama-v2")


def parsed(path: Path, key: str = "text", config: ReadConfig | None = None) -> list[Record | BrokenLine | None]:
    rule = config or ReadConfig()
    return [item for batch in read_file(path, rule) for item in parse_batch(batch, (key,), rule)]


def texts(items: Sequence[Record | BrokenLine | None]) -> list[str]:
    return [item.texts[0] if isinstance(item, Record) else repr(item) for item in items]


def gzipped_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def redpajama(folder: Path, num_signals: int = 3, bucket: str = "head") -> Path:
    """Three documents, the second of them a duplicate, with ``num_signals`` lines of signals."""
    name = f"2023-06/0000/en_{bucket}"
    documents = [{"raw_content": f"text {i}", "language": "en", "bucket": bucket} for i in range(3)]
    path = gzipped_lines(folder / f"documents/{name}.json.gz", documents)
    signals = [
        {"id": f"{name}.json.gz/{i}", "quality_signals": json.dumps({"rps_doc_word_count": [[0, 6, 50 + i]]})}
        for i in range(num_signals)
    ]
    gzipped_lines(folder / f"quality_signals/{name}.signals.json.gz", signals)
    duplicates = folder / f"duplicates/{name}.duplicates.parquet"
    duplicates.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"doc_id": [f"{name}.json.gz/1"], "digest": ["x"]}), duplicates)
    return path


def test_redpajama_documents_meet_their_signals_and_duplicates_row_by_row(tmp_path: Path) -> None:
    items = parsed(redpajama(tmp_path), "raw_content", REDPAJAMA)
    assert texts(items) == ["text 0", "text 1", "text 2"]
    records = [item for item in items if isinstance(item, Record)]
    assert [record.fields["is_duplicate"] for record in records] == [False, True, False]
    assert [lookup(record.fields, "quality_signals.rps_doc_word_count")[0][2] for record in records] == [50, 51, 52]


@pytest.mark.parametrize(("num_signals", "message"), [(2, "ends after line 2"), (4, "has more lines than")])
def test_signals_of_another_length_are_an_error(tmp_path: Path, num_signals: int, message: str) -> None:
    path = redpajama(tmp_path, num_signals)
    with pytest.raises(DataError, match=rf"en_head\.signals\.json\.gz: {message}"):
        parsed(path, "raw_content", REDPAJAMA)


def test_signals_of_another_document_are_a_broken_line(tmp_path: Path) -> None:
    path = redpajama(tmp_path)
    signals = tmp_path / "quality_signals/2023-06/0000/en_head.signals.json.gz"
    lines = gzip.decompress(signals.read_bytes()).splitlines(keepends=True)
    signals.write_bytes(gzip.compress(lines[0] + lines[2] + lines[1]))
    items = parsed(path, "raw_content", REDPAJAMA)
    assert isinstance(items[0], Record)
    assert all(isinstance(item, BrokenLine) and "files do not match" in item.message for item in items[1:])


def test_missing_signals_are_an_error_but_for_the_tail_bucket(tmp_path: Path) -> None:
    for bucket in ("tail", "middle"):
        path = redpajama(tmp_path / bucket, bucket=bucket)
        (tmp_path / bucket / f"quality_signals/2023-06/0000/en_{bucket}.signals.json.gz").unlink()
    assert len(parsed(tmp_path / "tail/documents/2023-06/0000/en_tail.json.gz", "raw_content", REDPAJAMA)) == 3
    with pytest.raises(DataError, match=r"signals\.json\.gz: missing.*--signals optional"):
        parsed(path, "raw_content", REDPAJAMA)
    optional = ReadConfig(format="redpajama-v2", signals="optional")
    assert texts(parsed(path, "raw_content", optional)) == ["text 0", "text 1", "text 2"]


def test_redpajama_folders_must_be_as_published(tmp_path: Path) -> None:
    path = gzipped_lines(tmp_path / "en_head.json.gz", [{"raw_content": "a"}])
    with pytest.raises(DataError, match=r"documents/<snapshot>/<shard>"):
        parsed(path, "raw_content", REDPAJAMA)


def test_a_folder_gives_documents_of_all_kinds_and_no_side_files(tmp_path: Path) -> None:
    redpajama(tmp_path / "pajama")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "notes.txt").write_text("no document")
    names = [path.name for path in expand_inputs([str(tmp_path)])]
    assert names == ["b.jsonl", "en_head.json.gz"]
    with pytest.raises(ConfigurationError, match="no file in this folder"):
        expand_inputs([str(tmp_path / "pajama/quality_signals")])
    with pytest.raises(ConfigurationError, match="names a file twice"):
        expand_inputs([str(tmp_path), str(tmp_path / "b.jsonl")])


def test_parquet_rows_are_read_with_row_numbers_and_broken_text_costs_one_row(tmp_path: Path) -> None:
    column = pyarrow.array([b"one", b"t\xffo", None, "dr\u00e9i".encode()], pyarrow.binary()).view(pyarrow.string())
    meta = [{"set": "C4"}, {"set": "C4"}, {"set": "Book"}, {"set": "Book"}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column, "meta": meta, "unused": [1, 2, 3, 4]}), path)
    items = parsed(path)
    assert [item.texts if isinstance(item, Record) else item.message[:14] for item in items if item] == [
        ("one",),
        "not UTF-8 at b",
        "field 'text' i",
        ("dréi",),
    ]
    assert texts(parsed(path, config=ReadConfig(utf8_errors="replace")))[1] == "t\ufffdo"
    assert texts(parsed(path, "meta.set")) == ["C4", "C4", "Book", "Book"]
    narrow = ReadConfig(columns=("text", "meta.set"))
    assert next(sorted(row) for batch in read_file(path, narrow) for row in batch.rows) == ["meta", "text"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: damaged or truncated after row 0"):
        parsed(path)


def test_rows_of_a_parquet_file_without_the_field_are_counted_as_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["a", "b"], "more": [1, 2]}), path)
    items = parsed(path, config=ReadConfig(columns=("text",)))
    assert [item.message for item in items if isinstance(item, BrokenLine)] == ["no field 'text'; it has 'body'"] * 2


def test_a_parquet_file_cut_in_its_data_is_an_error_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [str(i) * 50 for i in range(5000)]}), path, row_group_size=1000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.parquet: damaged or truncated after row \d+"):
        parsed(path)


def test_fields_are_found_by_dotted_path_also_inside_json_text() -> None:
    row = {"meta": '{"redpajama_set_name": "RedPajamaC4"}', "a": {"b": {"c": 1}}, "a.b": 2}
    assert lookup(row, "meta.redpajama_set_name") == "RedPajamaC4"
    assert lookup(row, "a.b.c") == 1
    assert lookup(row, "a.b") == 2  # an exact name wins
    with pytest.raises(ValueError, match=r"no field 'a\.x'; it has 'b'"):
        lookup(row, "a.x")
    with pytest.raises(ValueError, match=r"no field 'a\.b\.c\.d'; it has int"):
        lookup(row, "a.b.c.d")


@pytest.mark.parametrize(
    ("line", "rule", "expected"),
    [
        (b'{"text": "a\xffb"}', "replace", "a\ufffdb"),
        (b'{"text": "a\xffb"}', "ignore", "ab"),
        (b'{"text": "a\\ud800b"}', "replace", "a\ufffdb"),
        (b'{"text": "a\\ud83d\\ude00b"}', "fail", "a\U0001f600b"),
        (b'{"text": "ab", "score": NaN}', "fail", "ab"),
        (b'{"text": "a\\u0000b"}', "fail", "a\x00b"),
        (b'\xef\xbb\xbf{"text": "ab"}\r', "fail", "ab"),
        (b'{"text": "ab", "other": "\\ud800"}', "fail", "ab"),
    ],
)
def test_text_is_taken_by_rule(tmp_path: Path, line: bytes, rule: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    assert texts(parsed(path, config=ReadConfig(utf8_errors=rule))) == [expected]


def test_a_line_beyond_the_limit_is_broken_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'
    path.write_bytes(b'{"text": "1"}\n' + long + b'{"text": "3"}\n' + long)
    limited = ReadConfig(max_line_bytes=1000)
    items = parsed(path, config=limited)
    assert [item.number for item in items if isinstance(item, BrokenLine)] == [2, 4]
    assert [item.number for item in items if isinstance(item, Record)] == [1, 3]
    assert max(len(line) for batch in read_file(path, limited) for line in batch.lines) == 1001
    assert [len(text) for text in texts(parsed(path))] == [1, 5_000_000, 1, 5_000_000]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_keep_their_numbers_across_batches(tmp_path: Path, suffix: str) -> None:
    rows = [json.dumps({"text": f"{i} " + "x" * (i * 7919 % 3000)}) for i in range(3000)]  # 4.5 MB
    raw = "\n".join(rows).encode()
    packed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.ZstdCompressor().compress(raw)}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    batches = list(read_batches([path]))
    assert len(batches) > 3
    assert [line for batch in batches for line in batch.lines] == [row.encode() for row in rows]
    for batch in batches:
        assert batch.lines[0] == rows[batch.first_line - 1].encode()
    assert batches[-1].num_bytes_read == len(packed)
