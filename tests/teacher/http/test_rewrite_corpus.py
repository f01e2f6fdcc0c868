"""Covers tools/rewrite_corpus.py against a real server: shards, resuming, and what is left for another run."""

import json
import subprocess
import sys
from pathlib import Path

from tests.teacher.http.server import FaultServer

ROOT = Path(__file__).resolve().parents[3]


def run(folder, server, output, *flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "rewrite_corpus.py"), "--input", str(folder / "corpus.jsonl"), "--output",
         str(folder / output), "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--rewriter", "http",
         "--judge-endpoints", server.url, "--judge-served-model", "m", "--rewrite-suffix-length", "3",
         "--chunks-at-a-time", "2", "--judge-max-attempts", "1", *flags],
        capture_output=True, text=True,
    )  # fmt: skip


def records(folder, output):
    return [json.loads(line) for line in (folder / output).read_text().splitlines()]


def test_shards_cover_the_corpus_once_and_a_second_run_does_what_is_left(tmp_path):
    texts = ["1 2 3 4 5 6 7", "8 9", "10 11 12 13"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with FaultServer(["", "status 500"], answer=lambda body, index: " 91 92 93 94 95") as server:
        first = run(tmp_path, server, "out", "--num-shards", "2", "--shard", "1")
        assert first.returncode == 1 and "run the same command again" in first.stderr, first.stderr
        done = records(tmp_path, "out")
        assert len(done) == 2
        with (tmp_path / "out").open("a") as output:
            output.write('{"line": 3, "chu')
        second = run(tmp_path, server, "out", "--num-shards", "2", "--shard", "1")
        assert second.returncode == 0, second.stderr
        other = run(tmp_path, server, "other", "--num-shards", "2", "--shard", "0")
    assert other.returncode == 0 and "nothing left to do" in other.stdout
    found = records(tmp_path, "out")
    assert found[:2] == done and sorted((r["line"], r["chunk"]) for r in found) == [(1, 1), (1, 2), (3, 1)]
    assert {(r["rewrite"].split()[0], len(r["rewrite"].split()), r["status"]) for r in found} == {
        ("91", 3, "rewritten")
    }
    assert [r["suffix"].split() for r in sorted(found, key=lambda r: (r["line"], r["chunk"]))] == [
        ["4", "5", "6"], ["7"], ["13"],
    ]  # fmt: skip
    assert len(server.seen) == 4


def test_chunks_that_a_wrong_name_or_key_has_cost_are_asked_again_and_it_says_what_is_wrong(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "1 2 3 4 5 6 7 8 9 10 11 12 13"}) + "\n")
    with FaultServer(["status 401"] * 4, answer=lambda body, index: " 91 92 93 94 95") as server:
        wrong = run(tmp_path, server, "out", "--judge-served-model", "other")
        # The list of models tells of the name before anything is asked, not of a key that it does not need.
        assert wrong.returncode == 1 and not server.seen and "serves m, not other" in wrong.stderr
        refused = run(tmp_path, server, "out")
        assert refused.returncode == 1 and len(server.seen) == 4 and not records(tmp_path, "out")
        assert "without an answer: rejected: HTTP 401" in refused.stderr
        right = run(tmp_path, server, "out")
    assert right.returncode == 0 and "4 rewritten" in right.stdout and "warning" not in right.stderr
    assert [(r["chunk"], r["status"]) for r in records(tmp_path, "out")] == [(n, "rewritten") for n in (1, 2, 3, 4)]


def test_it_ends_with_the_first_chunks_of_which_none_is_answered(tmp_path):
    texts = "".join(json.dumps({"text": "1 2 3 4 5 6 7"}) + "\n" for _ in range(3))
    (tmp_path / "corpus.jsonl").write_text(texts)
    with FaultServer(fault=lambda number: "status 401") as server:
        assert run(tmp_path, server, "out").returncode == 1 and len(server.seen) == 2
