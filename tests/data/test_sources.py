"""Where documents are from: kept by preprocessing, through shards and merging, and shown on the data card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_sip.data.card import SourceCard, card_svg, card_text, corpus_cards
from megatron_sip.data.config import DataConfig
from megatron_sip.data.indexed import IndexedCorpus
from megatron_sip.data.preprocess import PreprocessConfig, preprocess
from megatron_sip.data.readers import ReadConfig
from megatron_sip.data.sharded import merge_shards, preprocess_shards
from megatron_sip.data.sources import SourceColumn, Sources, coded, read_sources, source_of, sources_path
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import TokenizerConfig

ROOT = Path(__file__).resolve().parents[2]
NULL = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=999)
FIELD = "meta.redpajama_set_name"
# (source, number of tokens); None: no such field. The empty document is counted, and is in no corpus.
ROWS = [("RedPajamaC4", 9), ("RedPajamaBook", 4), ("RedPajamaC4", 0), (None, 3), ("RedPajamaC4", 5), ("é\n", 1)]


def lines(rows: list[tuple[str | None, int]]) -> str:
    found = []
    for source, count in rows:
        meta = {} if source is None else {"redpajama_set_name": source}
        # Some copies store meta as text.
        text = " ".join(map(str, range(count)))
        found.append(json.dumps({"text": text, "meta": json.dumps(meta) if count == 5 else meta}))
    return "\n".join(found) + "\n"


def config(inputs: Path, **changes: object) -> PreprocessConfig:
    output = str(inputs.parent / "merged")
    return PreprocessConfig((str(inputs),), output, NULL, source_field=FIELD, **changes)  # type: ignore[arg-type]


def labels(prefix: str, count: int) -> list[str]:
    found = read_sources(prefix, count)
    assert found is not None
    return [found.names[code] for code in found.codes]


def test_sources_of_shards_merge_to_those_of_one_run(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "a.jsonl").write_text(lines(ROWS))
    (inputs / "b.jsonl").write_text(lines(ROWS[::-1]))
    wanted = ["RedPajamaC4", "RedPajamaBook", "(none)", "RedPajamaC4", "é\n"]
    preprocess_shards(config(inputs), tmp_path / "shards", log=lambda line: None)
    merge_shards(config(inputs), tmp_path / "shards")
    assert labels(str(tmp_path / "merged_text_document"), 10) == wanted + wanted[::-1]
    merged = sources_path(str(tmp_path / "merged_text_document")).read_bytes()
    preprocess(config(inputs, workers=2), lambda line: None)
    assert sources_path(str(tmp_path / "merged_text_document")).read_bytes() == merged
    done = json.loads((tmp_path / "shards/0-a.done.json").read_text())
    assert "0-a_text_document.sources" in done["files"]
    without = PreprocessConfig((str(inputs),), str(tmp_path / "merged"), NULL)
    with pytest.raises(ConfigurationError, match=r"begun with other source_field 'meta\.redpajama_set_name'"):
        preprocess_shards(without, tmp_path / "shards", log=lambda line: None)
    preprocess(without, lambda line: None)
    assert read_sources(str(tmp_path / "merged_text_document"), 10) is None  # those of the corpus before are gone


def test_parquet_columns_hold_sources_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["1 2", "3"], "meta": [{"redpajama_set_name": "A"}, None], "other": [1, 2]})
    pyarrow.parquet.write_table(table, path)
    preprocess(config(path, read=ReadConfig()), lambda line: None)
    assert labels(str(tmp_path / "merged_text_document"), 2) == ["A", "(none)"]


def test_the_card_counts_tokens_and_samples_of_each_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    preprocess(config(tmp_path / "a.jsonl"), lambda line: None)
    corpus = IndexedCorpus(str(tmp_path / "merged_text_document"), 1000)
    settings = DataConfig(seq_length=8, suffix_length=2)
    (card,) = corpus_cards([corpus], None, settings)
    # 9 tokens: cuts at 2, 4, 6; 5: at 2; 4: at 2; 3 and 1: none.
    assert card.sources == (
        SourceCard("RedPajamaC4", 2, 14, 4),
        SourceCard("RedPajamaBook", 1, 4, 1),
        SourceCard("(none)", 1, 3, 0),
        SourceCard("é\n", 1, 1, 0),
    )
    assert "63.6 %" in card_text(card, settings)
    assert card_svg([card]).count('class="source"') == 4


def test_the_tool_keeps_and_shows_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "999"]
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(tmp_path / "a.jsonl")]
    subprocess.run(
        [*command, "--output-prefix", str(tmp_path / "c"), *flags, "--source-field", FIELD],
        check=True,
        capture_output=True,
    )
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "--data-path", str(tmp_path / "c_text_document")]
    sizes = ["--seq-length", "8", "--suffix-length", "2", "--num-samples", "0", "--plot", str(tmp_path / "a.svg")]
    shown = subprocess.run([*command, *flags, *sizes], check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("RedPajamaC4")]
    assert line.split() == ["RedPajamaC4", "2", "14", "63.6", "%", "2", "4"]
    assert 'class="source"' in (tmp_path / "a.svg").read_text()


def test_a_sources_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.sources"
    assert read_sources(str(tmp_path / "c"), 1) is None
    for content in (b"", b"{}\n\0\0", b'{"names": ["a"]}\n\0', b'{"names": ["a"]}\n\1\0'):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"c\.sources: .*preprocess the corpus again"):
            read_sources(str(tmp_path / "c"), 1)


def test_fields_that_name_no_source_are_counted_as_none() -> None:
    for value in ({"a": 1}, [1], None):
        assert source_of({"s": value}, "s") == "(none)"
    assert (source_of({"s": 3}, "s"), source_of({"s": b"x"}, "s"), source_of({}, "s")) == ("3", "x", "(none)")
    assert source_of({"s": "{broken"}, "s.a") == "(none)"


def test_more_names_than_a_code_can_tell_are_refused() -> None:
    column = SourceColumn()
    column.add(Sources(tuple(map(str, range(1 << 16))), np.arange(1 << 16).astype(np.uint16)))
    with pytest.raises(DataError, match="more than 65,536 values"):
        column.add(coded(["one more"]))
