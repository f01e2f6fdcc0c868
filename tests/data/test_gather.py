"""The gathered corpus: docstrings by reading, no repetition, splits that share nothing; its tokenizer."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_sip.data.docstrings import Deduplicator, docstring_groups, without_prompts
from megatron_sip.data.gather import DEFAULT_SPLITS, gather
from megatron_sip.data.splits import parse_shares, split_of
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.tokenizer.training import train_sentencepiece

LONG = "A sentence that is long enough to count as documentation of something real, number {}."


def write_package(folder: Path, name: str, num_modules: int) -> None:
    (folder / name / "tests").mkdir(parents=True)
    (folder / name / "tests" / "hidden.py").write_text(f'"""{LONG.format("in tests")}"""\n')
    for i in range(num_modules):
        body = f'raise SystemExit("imported")\n\n\nclass Thing:\n    """{LONG.format(f"{name} class {i}")}"""\n\n'
        method = LONG.format(f"{name} method {i}")
        body += f'    def act(self):\n        """{method}\n\n        Shared boilerplate line."""\n'
        (folder / name / f"m{i:02}.py").write_text(f'"""{LONG.format(f"{name} module {i}")}"""\n{body}')


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


@pytest.fixture()
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    names = ("sipone", "siptwo")
    for name in names:
        write_package(tmp_path / "site", name, 40)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    return names


def test_splits_share_no_document_no_source_and_no_paragraph(tmp_path: Path, packages: tuple[str, ...]) -> None:
    report = gather(tmp_path / "out", packages, min_chars=200, workers=1)
    splits = read(tmp_path / "out")
    assert sorted(splits) == sorted(DEFAULT_SPLITS)
    rows = [(split, row) for split, found in splits.items() for row in found]
    assert report.documents == Counter(split for split, _ in rows)
    assert len({row["id"] for _, row in rows}) == len(rows)
    split_by_source = {(row["id"].split("#")[0], split) for split, row in rows}
    assert len({source for source, _ in split_by_source}) == len(split_by_source)
    paragraphs = Counter(part for _, row in rows for part in row["text"].split("\n\n"))
    # 2 packages x 40 modules x (module, class, method), and the shared line once: nothing lost, nothing twice.
    expected = {LONG.format(f"{name} {kind} {i}") for name in packages for kind in ("module", "class", "method")
                for i in range(40)}  # fmt: skip
    assert paragraphs == Counter(expected | {"Shared boilerplate line."})
    assert json.loads((tmp_path / "out" / "sources.json").read_text())["sipone"]["num_files"] == 40


def test_the_same_packages_give_the_same_files_byte_for_byte(tmp_path: Path, packages: tuple[str, ...]) -> None:
    gather(tmp_path / "one", packages, min_chars=200, workers=1)
    gather(tmp_path / "two", packages, min_chars=200, workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_documents_split_depends_on_its_key_alone() -> None:
    shares = {"a": 0.7, "b": 0.3}
    counts = Counter(split_of(f"file{i}", shares) for i in range(2000))
    assert 1330 < counts["a"] < 1470  # 1400 expected, 3.4 standard deviations
    assert {split_of("file1", shares) for _ in range(3)} == {split_of("file1", shares)}
    # Multiplying all shares changes nothing.
    assert all(split_of(f"f{i}", shares) == split_of(f"f{i}", {"a": 7, "b": 3}) for i in range(100))


def test_files_that_are_not_python_are_listed_and_prose_is_added(tmp_path: Path, packages: tuple[str, ...]) -> None:
    (tmp_path / "site" / "sipone" / "broken.py").write_text('"""x"""\ndef (:\n')
    prose = tmp_path / "prose"
    prose.mkdir()
    (prose / "novel.txt").write_text("\n\n".join(f"Paragraph {i} " + "word " * 200 for i in range(60)))
    report = gather(tmp_path / "out", packages, text_dirs=[prose], min_chars=200, workers=1)
    assert [line.split(":")[0] for line in report.unreadable] == ["sipone/broken.py"]
    rows = [row for found in read(tmp_path / "out").values() for row in found if row["source"] == "prose"]
    assert len(rows) == 4  # 60 paragraphs of about 1,013 characters in pieces of 20,000 at most
    assert sum(row["text"].count("Paragraph") for row in rows) == 60
    (prose / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 at byte 3"):
        gather(tmp_path / "out", packages, text_dirs=[prose], workers=1)


def test_a_split_without_a_document_is_an_error(tmp_path: Path, packages: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="split 'rare' got no document"):
        gather(tmp_path / "out", packages, {"most": 1.0, "rare": 1e-9}, workers=1)
    with pytest.raises(ConfigurationError, match="'judge' is not name:share"):
        parse_shares("policy:0.5,judge")
    with pytest.raises(ConfigurationError, match="a share above 0"):
        parse_shares("policy:0.5,judge:0")


def test_documentation_tables_of_c_functions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "docs.py"
    path.write_text(f'add_docstr(lib.abs, r"""\n    {LONG.format(1)}\n\n    Indented.\n    """.format(**common))\n')
    assert docstring_groups(path) == [LONG.format(1) + "\n\nIndented."]


def test_interpreter_sessions_and_rules_are_left_out() -> None:
    text = "Returns\n-------\nA value.\n\n>>> f(1)\n2\nmore output\n\nThe end.\n===="
    assert without_prompts(text).split() == ["Returns", "A", "value.", "The", "end."]


def test_repeated_paragraphs_and_lines_are_left_out_after_their_first() -> None:
    dedupe = Deduplicator(max_line_repeats=2)
    line = "out (Tensor, optional): the output tensor."
    assert (
        dedupe(f"One paragraph that comes back.\n\n{line}\nalpha") == f"One paragraph that comes back.\n\n{line}\nalpha"
    )
    assert dedupe(f"One  paragraph that COMES back.\n\n{line}\nbeta") == f"{line}\nbeta"
    assert dedupe(f"{line}\ngamma") == "gamma"


def test_a_trained_tokenizer_is_lossless_and_reproducible(tmp_path: Path) -> None:
    text = "def f(x):\n    return x\n\n\n  The quick brown fox, 東京 🦊 and\ttabs.  "
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"{text} {i} times the {i % 9} things"}) + "\n" for i in range(300)))
    sizes = [train_sentencepiece([source], tmp_path / f"{name}.model", 330, num_threads=1) for name in "ab"]
    assert sizes == [330, 330]
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "a.model")))
    assert tokenizer.eod_id == 2
    for cut in range(len(text)):
        head, rest = tokenizer.encode(text[:cut]), tokenizer.encode_continuation(text[cut:])
        assert tokenizer.decode(head + rest) == text


def test_tokenizer_training_names_what_it_cannot_use(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:2: no document with text in 'text'"):
        train_sentencepiece([source], tmp_path / "m.model", 300)
    source.write_text("\n")
    with pytest.raises(DataError, match="no text to train"):
        train_sentencepiece([source], tmp_path / "m.model", 300)
    source.write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="--vocab-size 30000: SentencePiece cannot"):
        train_sentencepiece([source], tmp_path / "m.model", 30_000)
    assert not (tmp_path / "m.model").exists()
