"""The unsafe test set against a server that fails, is killed and comes back."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from megatron_sip.data.config import DataConfig
from megatron_sip.data.indexed import IndexedCorpus, open_indexed
from megatron_sip.data.samples import SuffixDataset
from megatron_sip.errors import DataError
from megatron_sip.evaluation.unsafe_set import Journal, PrefixVerdict, verdict_of
from tests.data.corpora import write_corpus
from tests.teacher.http.server import FaultServer

ROOT = Path(__file__).resolve().parents[2]
# Each document of 6 tokens is one prefix of 4 and one suffix of 2; the first token says what the judge thinks of it.
DOCUMENTS = [[kind, i, i, i, 90, 91] for i, kind in enumerate([1, 2, 3, 1, 1, 2, 3, 1, 2, 1])]
SAFETY = {"1": "NO", "2": "YES"}


def answer(body: dict, index: int) -> str:
    """Unsafe, safe, or unsafe in all votes but the fourth."""
    kind = body["messages"][-1]["content"].split("<text>\n")[1].split()[0]
    return "FINAL DECISION: " + SAFETY.get(kind, "YES" if index == 3 else "NO")


def command(folder: Path, *flags: str) -> list[str]:
    (folder / "test.meta.json").unlink(missing_ok=True)  # its tokenizer is not NullTokenizer's
    return [
        sys.executable, str(ROOT / "tools" / "select_unsafe.py"), "--data-path", str(folder / "test"), "--output",
        str(folder / "unsafe"), "--seq-length", "6", "--suffix-length", "2", "--min-prefix-length", "4",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", *flags,
    ]  # fmt: skip


def http(server: FaultServer) -> list[str]:
    return ["--teacher", "http", "--judge-endpoints", server.url, "--judge-served-model", "m",
            "--judge-max-attempts", "1", "--judge-parse-attempts", "1", "--prefixes-at-a-time", "5"]  # fmt: skip


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, *flags: str) -> Done:
    """The tool in this process: starting it costs seconds of imports."""
    specification = importlib.util.spec_from_file_location("select_unsafe", ROOT / "tools" / "select_unsafe.py")
    assert specification is not None and specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    sys.modules["select_unsafe"] = tool
    specification.loader.exec_module(tool)
    output, errors, message = io.StringIO(), io.StringIO(), ""
    with (
        mock.patch.object(sys, "argv", command(folder, *flags)[1:]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            tool.main()
        except SystemExit as ended:
            message = str(ended)
    return Done(int(bool(message)), output.getvalue(), errors.getvalue() + message)


def kept(folder: Path) -> list[list[int]]:
    corpus = open_indexed(str(folder / "unsafe"), 101, None)
    return sorted(corpus.document(i).tolist() for i in range(corpus.num_documents))


def verdicts(folder: Path) -> dict[int, str]:
    """Document -> its last verdict."""
    lines = [json.loads(line) for line in (folder / "unsafe.votes.jsonl").read_text().splitlines()[1:]]
    return {line["document"]: line["verdict"] for line in lines}


@pytest.mark.parametrize(
    ("given", "unsafe", "verdict"),
    [(8, 8, "unsafe"), (8, 7, "mixed"), (8, 0, "safe"), (7, 7, "missing"), (0, 0, "missing")],
)
def test_only_eight_of_eight_votes_are_enough(given: int, unsafe: int, verdict: str) -> None:
    assert verdict_of(given, unsafe, 8) == verdict


def test_the_search_ends_when_no_request_comes_through(tmp_path: Path) -> None:
    write_corpus(tmp_path, DOCUMENTS, "test", vocab_size=101)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    flags = ["--teacher", "http", "--judge-endpoints", f"http://127.0.0.1:{port}/v1", "--judge-served-model", "m"]
    found = run(tmp_path, *flags, "--judge-max-attempts", "1", "--prefixes-at-a-time", "5")
    assert found.returncode == 1 and "none of 40 requests came through" in found.stderr  # 5 prefixes, 8 votes each
    assert not verdicts(tmp_path)


def test_a_failed_vote_keeps_a_prefix_out_until_a_second_run_gets_it(tmp_path: Path) -> None:
    write_corpus(tmp_path, DOCUMENTS, "test", vocab_size=101)
    with FaultServer(["status 500", "reset", "abort-first"], answer=answer) as server:
        first = run(tmp_path, *http(server))
        assert first.returncode == 1 and "run the same command again" in first.stderr, first.stderr
        found = verdicts(tmp_path)
        assert list(found.values()).count("missing") == 3
        expected = {1: "unsafe", 2: "safe", 3: "mixed"}
        assert all(v in (expected[DOCUMENTS[document][0]], "missing") for document, v in found.items())
        missing = sum(v == "missing" for document, v in found.items() if DOCUMENTS[document][0] == 1)
        if missing < 5:
            assert len(kept(tmp_path)) == 5 - missing
        assert f"{5 - missing} unsafe" in first.stdout and "3 missing" in first.stdout
        assert len(server.seen) == 10 and {seen.body["n"] for seen in server.seen} == {8}
        second = run(tmp_path, *http(server))
        assert second.returncode == 0, second.stderr
        assert len(server.seen) == 13  # the three that were missing, and nothing else
        third = run(tmp_path, *http(server))
        assert third.returncode == 0 and len(server.seen) == 13
    assert kept(tmp_path) == [document for document in sorted(DOCUMENTS) if document[0] == 1]
    assert "10 prefixes judged: 5 unsafe, 2 mixed, 3 safe, 0 missing" in second.stdout
    # What evaluation draws from it with --sample-cut last: exactly these prefixes and suffixes.
    samples = SuffixDataset(
        [IndexedCorpus(str(tmp_path / "unsafe"), 101)], suffix_length=2, max_prefix_length=4, cut="last"
    )
    drawn = [samples.get(i, 0, i) for i in range(len(samples))]
    assert sorted([*s.prefix.tolist(), -1, *s.suffix.tolist()] for s in drawn) == [
        [*document[:4], -1, *document[4:]] for document in sorted(DOCUMENTS) if document[0] == 1
    ]


def test_a_killed_search_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    write_corpus(tmp_path, DOCUMENTS, "test", vocab_size=101)
    with FaultServer(fault=lambda number: "" if number < 5 else "hang", answer=answer) as server:
        process = subprocess.Popen(command(tmp_path, *http(server)), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(server.seen) < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(verdicts(tmp_path)) == 5 and not (tmp_path / "unsafe.idx").exists()
    with (tmp_path / "unsafe.votes.jsonl").open("a") as file:
        file.write('{"sample": 9, "docu')  # what the kill may have left
    with FaultServer(answer=answer) as server:
        again = run(tmp_path, *http(server))
        assert again.returncode == 0, again.stderr
        assert len(server.seen) == 5
        few = run(tmp_path, *http(server), "--num-prefixes", "2")
        assert len(server.seen) == 5 and "wrote 2 of 2" in few.stdout
        other = run(tmp_path, *http(server), "--unsafe-votes", "4")
    assert len(kept(tmp_path)) == 2
    assert other.returncode == 1 and "begun with other options" in other.stderr


def test_the_embedded_judge_selects_by_its_words(tmp_path: Path) -> None:
    write_corpus(tmp_path, DOCUMENTS, "test", vocab_size=101)
    (tmp_path / "words").write_text("3\n")
    done = run(tmp_path, "--safety-words", str(tmp_path / "words"))
    assert done.returncode == 0, done.stderr
    # Documents 2 and 6 begin with 3; document 3 has it among its numbers.
    assert kept(tmp_path) == sorted(document for document in DOCUMENTS if 3 in document)
    nothing = run(tmp_path, "--safety-words", str(tmp_path / "words"), "--seed", "1", "--output", str(tmp_path / "b"))
    assert nothing.returncode == 0
    (tmp_path / "words").write_text("77\n")
    nothing = run(tmp_path, "--safety-words", str(tmp_path / "words"), "--output", str(tmp_path / "c"))
    assert nothing.returncode == 1 and "no prefix is unsafe in all votes" in nothing.stderr
    assert not (tmp_path / "c.idx").exists()


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.votes.jsonl"
    Journal(path, {"votes": 8}).add([PrefixVerdict(0, 0, 8, 8, "unsafe", "text")])
    assert Journal(path, {"votes": 8}).kept(5) == [0]
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="damaged"):
        Journal(path, {"votes": 8})


def test_short_documents_give_no_last_cut(tmp_path: Path) -> None:
    config = DataConfig(seq_length=6, suffix_length=2, sample_cut="last")
    config.validate()
    corpus = IndexedCorpus(write_corpus(tmp_path, [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5]], vocab_size=101), 101)
    samples = SuffixDataset([corpus], suffix_length=2, max_prefix_length=4, cut="last")
    assert [samples.get(i, 0, i).suffix.tolist() for i in range(len(samples))] == [[2, 3], [4, 5]]
