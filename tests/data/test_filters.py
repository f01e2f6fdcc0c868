"""Filters: the paper's unsafe subset in both readings, Gopher's rules, sets, predicates, and what a dry run says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.data.dryrun import dry_run
from megatron_sip.data.filters import DocumentFilter, FilterConfig
from megatron_sip.data.preprocess import PreprocessConfig
from megatron_sip.data.quality import top_ngram_share
from megatron_sip.data.records import Record
from megatron_sip.data.splits import text_hash
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import TokenizerConfig

UNSAFE: dict[str, Any] = {
    "rps_doc_word_count": [[0, 9, 50.0]],
    "rps_doc_mean_word_length": [[0, 9, 3.0]],
    "rps_doc_symbol_to_word_ratio": [[0, 9, 0.1]],
    "ccnet_nlines": [[0, 9, 10.0]],
    "rps_lines_start_with_bulletpoint": [[i, i + 1, 1.0] for i in range(9)] + [[9, 10, 0.0]],
    "rps_doc_frac_chars_top_2gram": [[0, 9, 0.2]],
    "rps_doc_ldnoobw_words": [[0, 9, 5.0]],
    "rps_doc_ut1_blacklist": [[0, 9, 0.0]],
}
"""Every value at its limit, category 0 of the blocklist: still in."""


def is_mild(fields: Mapping[str, Any]) -> bool:
    return fields["rating"] < 3


def record(text: str = "some text", **fields: Any) -> Record:
    return Record(1, (text,), fields)


def verdict(reading: str, **changes: Any) -> str | None:
    signals = {name: value for name, value in {**UNSAFE, **changes}.items() if value is not None}
    return DocumentFilter(FilterConfig(unsafe_subset=reading))(record(quality_signals=signals))


@pytest.mark.parametrize("reading", ["code", "text"])
def test_the_unsafe_subset_keeps_what_is_at_its_limits(reading: str) -> None:
    assert verdict(reading) is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"rps_doc_word_count": None}, "word count"),
        ({"rps_doc_word_count": [[0, 9, 49]]}, "word count"),
        ({"rps_doc_word_count": [[0, 9, 100_001]]}, "word count"),
        ({"rps_doc_mean_word_length": [[0, 9, 10.1]]}, "mean word length"),
        ({"rps_doc_symbol_to_word_ratio": [[0, 9, 0.11]]}, "symbols per word"),
        ({"rps_lines_start_with_bulletpoint": [[i, i + 1, 1.0] for i in range(10)]}, "bullet lines"),
        ({"rps_doc_frac_chars_top_2gram": [[0, 9, 0.21]]}, "top 2-gram"),
    ],
)
@pytest.mark.parametrize("reading", ["code", "text"])
def test_the_unsafe_subset_drops_what_is_beyond_them(reading: str, changes: dict[str, Any], rule: str) -> None:
    assert verdict(reading, **changes) == f"unsafe subset: {rule}"


@pytest.mark.parametrize(
    ("curses", "category", "code", "text"),
    [
        (5.0, 0.0, None, None),
        (5.0, None, "unsafe subset: blocklist", None),
        (4.0, 0.0, "unsafe subset: curse words", None),
        (4.0, None, "unsafe subset: curse words", "unsafe subset: curse words or blocklist"),
    ],
)
def test_the_two_readings_differ_in_and_and_or(curses: float, category: float | None, code: str, text: str) -> None:
    changes = {"rps_doc_ldnoobw_words": [[0, 9, curses]], "rps_doc_ut1_blacklist": [[0, 9, category]]}
    assert (verdict("code", **changes), verdict("text", **changes)) == (code, text)


def test_signals_may_be_json_text_and_must_be_there() -> None:
    keep = DocumentFilter(FilterConfig(unsafe_subset="code"))
    assert keep(record(quality_signals=json.dumps(UNSAFE))) is None
    with pytest.raises(ValueError, match="--format redpajama-v2"):
        keep(record())


def test_gophers_rules_name_what_is_wrong() -> None:
    keep = DocumentFilter(FilterConfig(gopher=True))
    good = " ".join(f"the word{i} that number{i} of list{i}" for i in range(10))
    assert keep(record(good)) is None
    assert keep(record("the word of that")) == "gopher: word count"
    assert keep(record("a b " * 30)) == "gopher: mean word length"
    assert keep(record(good + " #" * 7)) == "gopher: symbols per word"  # 7 of 67 words
    assert keep(record("\n".join(f"- the word{i} that number{i} of" for i in range(10)))) == "gopher: bullet lines"
    assert keep(record("\n".join(f"the word{i} that number{i} go" + "..." * (i < 4) for i in range(10)))) is not None
    assert keep(record(" ".join(str(1000 + i) for i in range(60)))) == "gopher: words with letters"
    assert keep(record(" ".join(f"word{i}" for i in range(60)))) == "gopher: stop words"
    assert keep(record("the same words of " * 20)) == "gopher: repetition"


def test_the_share_of_the_top_ngram_counts_characters() -> None:
    # "ab cd" three times is 12 of the 12 + 3 characters.
    assert top_ngram_share(["ab", "cd", "ab", "cd", "ab", "cd", "x", "y", "z"], 2) == pytest.approx(12 / 15)
    assert top_ngram_share(["a", "b", "c"], 2) == 0
    assert top_ngram_share(["a"], 2) == 0


def test_rules_read_fields_and_the_first_that_fails_is_named() -> None:
    config = FilterConfig(languages=("en",), buckets=("head", "middle"), sets=("C4", "RedPajamaBook"))
    keep = DocumentFilter(config)
    fields = {"language": "en", "bucket": "head", "meta": '{"redpajama_set_name": "RedPajamaC4"}'}
    assert keep(record(**fields)) is None
    assert keep(record(**{**fields, "meta": {"redpajama_set_name": "RedPajamaBook"}})) is None
    assert keep(record(**{**fields, "meta": {"redpajama_set_name": "RedPajamaArXiv"}})) == "set"
    assert keep(record(**{**fields, "bucket": "tail", "language": "de"})) == "language"
    with pytest.raises(ValueError, match="no field 'language'"):
        keep(record(bucket="head"))


def test_a_users_predicate_decides_and_its_failure_belongs_to_the_line() -> None:
    name = f"{__name__}:is_mild"
    keep = DocumentFilter(FilterConfig(predicate=name))
    assert keep(record(rating=2)) is None
    assert keep(record(rating=3)) == f"predicate {name}"
    with pytest.raises(ValueError, match="raised KeyError: 'rating'"):
        keep(record())
    for wrong in ("absent_module:f", f"{__name__}:absent"):
        with pytest.raises(ConfigurationError, match="PYTHONPATH"):
            DocumentFilter(FilterConfig(predicate=wrong))
    with pytest.raises(ConfigurationError, match="write module:function"):
        DocumentFilter(FilterConfig(predicate="is_mild"))


def test_excluded_texts_are_found_whatever_their_case_and_white_space(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text(text_hash("Some  TEXT\n") + "\n")
    keep = DocumentFilter(FilterConfig(exclude=str(tmp_path / "out.txt")))
    assert (keep(record("some text")), keep(record("some texts"))) == ("excluded", None)
    (tmp_path / "out.txt").write_text("nonsense\n")
    with pytest.raises(DataError, match="'nonsense' is not a text hash"):
        DocumentFilter(FilterConfig(exclude=str(tmp_path / "out.txt")))


def test_a_dry_run_accounts_for_every_sampled_line_and_writes_nothing(tmp_path: Path) -> None:
    rows = ['{"text": "a", "language": "en"}', '{"text": "b", "language": "de"}', "", '{"text": "c"}']
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows * 5) + "\n")
    config = PreprocessConfig(
        (str(tmp_path),), str(tmp_path / "out"), TokenizerConfig(), filters=FilterConfig(languages=("en",))
    )
    result = dry_run(config, 12)
    assert (result.num_files, result.num_lines) == (3, 12)
    assert (result.num_kept, result.num_blank, result.num_broken, result.dropped) == (3, 3, 3, {"language": 3})
    assert result.examples == {"kept": ["a"] * 3, "language": ["b"] * 3}
    assert result.errors[0].startswith(f"{tmp_path / '0.jsonl'}:4: no field 'language'")
    assert len(list(tmp_path.iterdir())) == 3
