"""tools/split_corpus.py as it is called: a proof, and exclusions that mend and that preprocessing takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_sip.data.splits import text_hash

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def numbers(start: int) -> str:
    return " ".join(map(str, range(start, start + 40)))


def test_overlap_ends_in_failure_and_the_exclusions_end_the_overlap(tmp_path: Path) -> None:
    near = numbers(0).replace(" 20 ", " 99 ")
    policy = write(tmp_path / "policy.jsonl", [numbers(0), numbers(100), numbers(200)])
    judge = write(tmp_path / "judge.jsonl", [numbers(300), near, numbers(100)])
    splits = ["--split", f"policy={policy}", "--split", f"judge={judge}"]
    found = tool("split_corpus.py", *splits, "--write-exclusions", tmp_path / "out")
    assert found.returncode == 1, found.stderr
    assert "2 exact and 2 near copies across splits" in found.stdout
    assert f"judge {judge}:2: 76 % of its 8-grams in another split" in found.stdout  # 8 of 33 are gone
    assert (tmp_path / "out/policy.txt").read_text() == ""
    assert (tmp_path / "out/judge.txt").read_text().split() == sorted([text_hash(near), text_hash(numbers(100))])

    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "999", "--exclude", tmp_path / "out/judge.txt"]
    kept = tool("preprocess_data.py", "--input", judge, "--output-prefix", tmp_path / "judge", *flags)
    assert kept.returncode == 0, kept.stderr
    assert "dropped by excluded: 2" in kept.stdout and "1 documents" in kept.stdout
    apart = tool("split_corpus.py", "--split", f"a={policy}", "--split", f"b={write(judge, [numbers(300)])}")
    assert apart.returncode == 0 and "0 exact and 0 near copies across splits" in apart.stdout


def test_a_corpus_cut_by_hash_has_no_overlap_but_near_copies(tmp_path: Path) -> None:
    corpus = write(tmp_path / "all.jsonl", [numbers(50 * i) for i in range(40)])
    shares = "policy:0.5,judge:0.5"
    found = tool("split_corpus.py", "--input", corpus, "--splits", shares)
    assert found.returncode == 0, found.stdout + found.stderr
    counts = [int(line.split()[1]) for line in found.stdout.splitlines() if line.split()[0] in ("policy:", "judge:")]
    assert sum(counts) == 40 and len(counts) == 2


def test_broken_lines_end_the_proof_unless_they_are_to_be_left_out(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", [numbers(0), numbers(100)])
    corpus.write_text(corpus.read_text() + '{"text": 5}\n')
    flags = ["--split", f"a={corpus}", "--split", f"b={write(tmp_path / 'b.jsonl', [numbers(200)])}"]
    failed = tool("split_corpus.py", *flags)
    assert failed.returncode == 1 and f"{corpus}:3: field 'text' is int, not text" in failed.stderr
    skipped = tool("split_corpus.py", *flags, "--on-error", "skip")
    assert skipped.returncode == 0 and f"left out: {corpus}:3" in skipped.stderr
    assert "--splits" in tool("split_corpus.py", "--input", corpus).stderr
    missing = tool("split_corpus.py", "--split", f"a={tmp_path}/none", "--split", f"b={corpus}")
    assert "no such file" in missing.stderr
    assert "write NAME=PATH" in tool("split_corpus.py", "--split", "a", "--split", "b").stderr


def test_nothing_is_proved_of_one_split_or_of_one_without_documents(tmp_path: Path) -> None:
    corpus, empty = write(tmp_path / "a.jsonl", [numbers(0)]), write(tmp_path / "b.jsonl", [])
    for flags, message in (
        (("--split", f"a={corpus}"), "only the split 'a' is named"),
        (("--split", f"a={corpus}", "--split", f"b={empty}"), "split 'b' has no document: nothing is proved"),
        (("--input", corpus, "--splits", "../a:0.5,b:0.5"), "split '../a': a name is made of letters"),
        (("--split", f"a={corpus}", "--split", f"b={corpus}", "--write-exclusions", corpus), "cannot be written"),
    ):
        failed = tool("split_corpus.py", *flags)
        assert failed.returncode == 1 and message in failed.stderr and failed.stderr.count("\n") == 1
