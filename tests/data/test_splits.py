"""Splits: stable, in proportion, and a proof that finds exact and near copies and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sip.data.filters import DocumentFilter, FilterConfig
from megatron_sip.data.records import Record
from megatron_sip.data.splits import OverlapSearch, ngram_hashes, parse_shares, search_overlap, text_hash
from megatron_sip.errors import ConfigurationError

SHARES = "policy:0.8,judge:0.1,test:0.1"


def words(seed: int, count: int = 200) -> list[str]:
    return [f"w{number}" for number in np.random.default_rng(seed).integers(0, 50_000, count)]


def split_texts(text: str) -> list[str]:
    """The splits that take a text, by the filter of tools/preprocess_data.py."""
    found = []
    for name in parse_shares(SHARES):
        if DocumentFilter(FilterConfig(splits=SHARES, split=name))(Record(1, (text,), {})) is None:
            found.append(name)
    return found


def test_every_document_is_in_exactly_one_split_in_proportion() -> None:
    found = [split_texts(f"document {i}") for i in range(1000)]
    assert all(len(names) == 1 for names in found)
    counts = {name: sum(names == [name] for names in found) for name in parse_shares(SHARES)}
    # Three standard deviations of a binomial: 38 and 28.
    assert abs(counts["policy"] - 800) < 38
    assert abs(counts["judge"] - 100) < 28


def test_copies_that_differ_in_case_and_white_space_go_to_one_split() -> None:
    assert all(split_texts(f"Document {i} of\n many") == split_texts(f"document {i}  OF many") for i in range(50))


def test_a_field_can_decide_on_the_split() -> None:
    rule = DocumentFilter(FilterConfig(splits=SHARES, split="policy", split_key="meta.id"))
    verdicts = {rule(Record(1, (text,), {"meta": {"id": "x"}})) for text in map(str, range(50))}
    assert len(verdicts) == 1
    with pytest.raises(ValueError, match=r"no field 'meta\.id'"):
        rule(Record(1, ("a",), {}))


@pytest.mark.parametrize("shares", ["policy", "policy:x", "policy:0", "policy:nan", "a:1,a:2", ":1"])
def test_shares_that_make_no_sense_are_refused(shares: str) -> None:
    with pytest.raises(ConfigurationError, match="--splits"):
        parse_shares(shares)


def test_split_options_go_together() -> None:
    with pytest.raises(ConfigurationError, match="go together"):
        FilterConfig(splits=SHARES).validate()
    with pytest.raises(ConfigurationError, match="--split other: not one of"):
        FilterConfig(splits=SHARES, split="other").validate()


def test_ngram_hashes_are_those_of_the_distinct_ngrams() -> None:
    assert len(ngram_hashes("a b c a b c a", 3)) == 3  # abc, bca, cab
    assert set(ngram_hashes("x a b c", 3)) & set(ngram_hashes("A  B\nC y", 3)) == set(ngram_hashes("a b c", 3))
    assert len(ngram_hashes("a b", 3)) == 1
    assert len(ngram_hashes(" ", 3)) == 0
    assert not set(ngram_hashes("a b", 2)) & set(ngram_hashes("b a", 2))
    assert abs(len(ngram_hashes(" ".join(words(0, 20_000)), 8, 0.25)) - 5000) < 200


def test_the_proof_finds_exact_and_near_copies_and_nothing_else() -> None:
    near = words(1)
    near[100] = "changed"  # 8 of its 193 8-grams differ
    whole = words(2, 400)
    documents = [
        ("policy", "p0", " ".join(words(0))),
        ("policy", "p1", " ".join(words(1))),
        ("policy", "p2", " ".join(whole[100:200])),  # an excerpt of v2
        ("policy", "p3", " ".join(words(3))),
        ("judge", "j0", " ".join(words(0)).upper()),
        ("judge", "j3", " ".join([*words(3)[:40], *words(4)[:160]])),  # a quotation: 33 of 193 8-grams
        ("validation", "v1", " ".join(near)),
        ("validation", "v2", " ".join(whole)),
    ]
    report = search_overlap(documents, n=8, rate=1.0, threshold=0.5)
    found = {document.name: document for document in report.overlapping}
    assert set(found) == {"p0", "p1", "p2", "j0", "v1"}
    assert found["p0"].is_exact and found["j0"].is_exact and not found["v1"].is_exact
    assert found["v1"].share == pytest.approx(185 / 193)
    assert found["p2"].share == 1.0
    assert report.num_documents == {"policy": 4, "judge": 2, "validation": 2}

    # What it asks to leave out mends it: the later one of a pair, and the excerpt, whose source has little of it.
    text_of = {name: text for _, name, text in documents}
    assert report.exclusions == {
        "policy": [text_hash(text_of["p2"])],
        "judge": [text_hash(text_of["j0"])],
        "validation": [text_hash(text_of["v1"])],
    }
    left = [item for item in documents if text_hash(item[2]) not in report.exclusions[item[0]]]
    assert len(left) == 5
    assert not search_overlap(left, 8, 1.0, 0.5).overlapping


def test_copies_within_one_split_are_no_overlap() -> None:
    text = " ".join(words(0))
    assert not search_overlap([("policy", "a", text), ("policy", "b", text)], 8, 1.0, 0.5).overlapping


def test_documents_outside_the_sample_are_counted_and_still_compared_exactly() -> None:
    report = search_overlap([("a", "0", "short"), ("b", "1", "short"), ("b", "2", "other")], 8, 1e-9, 0.5)
    assert report.num_unsampled == 3
    assert [document.name for document in report.overlapping] == ["0", "1"]
    with pytest.raises(ConfigurationError, match="--sample-rate 0"):
        OverlapSearch(rate=0)
