"""tools/make_judge_data.py and tools/judge_bench.py on a small corpus, offline."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megatron_sip.config import from_mapping
from megatron_sip.errors import DataError, JudgeError
from megatron_sip.teacher.http.corrupter import MARKER
from tests.teacher.http.server import FaultServer
from tests.train.teacher_world import write_world
from tools import judge_bench, make_judge_data
from tools.make_judge_data import DataOptions

WANTED = {
    "quality_train": 40,
    "quality_valid": 8,
    "safety_train": 12,
    "safety_valid": 4,
    "rewrite_train": 12,
    "rewrite_valid": 4,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of 20 words from two sets, every third with the one unsafe word."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    words = ["ka", "lo", "mi", "nu", "po"]
    with (folder / "corpus.jsonl").open("w") as stream:
        for number in range(400):
            # Each its own: copies would all serve the same file.
            text = [words[(number // 5 ** (place % 4) + place * place) % 5] for place in range(20)]
            if number % 3 == 0:
                text[4::3] = ["zux"] * len(text[4::3])
            meta = {"set": "wiki" if number % 2 else "book"}
            stream.write(json.dumps({"text": " " + " ".join(text), "meta": meta}) + "\n")
    return folder


def options(world: Path, output: Path, **changes: Any) -> DataOptions:
    values = {
        "input": [str(world / "corpus.jsonl")],
        "output": str(output),
        "source_key": "meta.set",
        "tokenizer_model": str(world / "world.model"),
        "safety_words": str(world / "unsafe.txt"),
        "example_suffix_length": 6,
        "example_prefix_length": 4,
        "example_min_prefix_length": 2,
        "documents_at_a_time": 16,
        **WANTED,
        **changes,
    }
    return from_mapping(DataOptions, values)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def made(world: Path) -> Path:
    asyncio.run(make_judge_data.make(options(world, world / "made")))
    return world / "made"


def test_there_are_as_many_examples_as_asked_for_half_of_each_answer(made: Path) -> None:
    found = read(made)
    counts = {name: Counter(record["label"] for record in records) for name, records in found.items()}
    assert counts == {
        "quality.train.jsonl": {1: 20, 2: 20},
        "quality.valid.jsonl": {1: 4, 2: 4},
        "safety.train.jsonl": {"safe": 6, "unsafe": 6},
        "safety.valid.jsonl": {"safe": 2, "unsafe": 2},
        "rewrite.train.jsonl": {"safe": 6, "unsafe": 6},
        "rewrite.valid.jsonl": {"safe": 2, "unsafe": 2},
    }


def test_every_pair_stands_there_in_both_orders_and_its_label_names_the_original(made: Path, world: Path) -> None:
    documents = [json.loads(line)["text"] for line in (world / "corpus.jsonl").read_text().splitlines()]
    records = read(made)["quality.train.jsonl"]
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert first["options"] == second["options"][::-1] and (first["label"], second["label"]) == (1, 2)
        original, corrupted = first["options"]
        text = documents[first["document"]]
        assert first["prefix"] + original in text and first["prefix"] + corrupted not in text
        assert first["source"] == ("wiki" if first["document"] % 2 else "book")


def test_labels_are_the_safety_judges_and_documents_serve_one_file_each(made: Path) -> None:
    found = read(made)
    for record in [*found["safety.train.jsonl"], *found["rewrite.train.jsonl"]]:
        assert ("zux" in record.get("text", record.get("suffix"))) == (record["label"] == "unsafe")
    owners: dict[int, set[str]] = {}
    for name, records in found.items():
        for record in records:
            owners.setdefault(record["document"], set()).add(name)
    assert all(len(names) == 1 for names in owners.values())


def test_a_run_that_was_stopped_goes_on_to_the_same_files(world: Path, made: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping(make_judge_data.Maker):
        batches = 0

        async def make(self, cuts: Any, next_line: int) -> None:
            if Stopping.batches == 2:
                raise Stop
            Stopping.batches += 1
            await super().make(cuts, next_line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_judge_data, "Maker", Stopping)
        with pytest.raises(Stop):
            asyncio.run(make_judge_data.make(options(world, tmp_path)))
    # As if killed while it appended: a line that progress does not know of.
    with (tmp_path / "quality.train.jsonl").open("a") as stream:
        stream.write('{"task": "qual')
    assert 0 < len((tmp_path / "safety.train.jsonl").read_text().splitlines()) < 12
    asyncio.run(make_judge_data.make(options(world, tmp_path)))
    assert read(tmp_path) == read(made)
    with pytest.raises(DataError, match="made with other options"):
        asyncio.run(make_judge_data.make(options(world, tmp_path, seed=9)))


def test_copies_of_a_document_serve_the_same_kind_and_split(world: Path, tmp_path: Path) -> None:
    """Every document stands there three times, once with other white space: none is both learned and held out."""
    lines = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    copies = [{**line, "text": text} for line in lines for text in (line["text"], line["text"], line["text"] + "  ")]
    (tmp_path / "copies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in copies))
    asyncio.run(make_judge_data.make(options(world, tmp_path / "made", input=[str(tmp_path / "copies.jsonl")])))
    owners: dict[int, set[str]] = {}
    for name, records in read(tmp_path / "made").items():
        for record in records:
            owners.setdefault(record["document"] // 3, set()).add(name)
    assert len(owners) > 20 and all(len(names) == 1 for names in owners.values())


def test_files_that_are_not_as_they_were_left_are_refused(world: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "safety.train.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"safety\.train\.jsonl is not as progress\.json says"):
        asyncio.run(make_judge_data.make(options(world, tmp_path / "foreign")))
    assert (tmp_path / "foreign" / "safety.train.jsonl").read_text() == "mine\n"
    shutil.copytree(made, tmp_path / "cut")
    (tmp_path / "cut" / "quality.train.jsonl").write_text("")
    with pytest.raises(DataError, match="give another --output"):
        asyncio.run(make_judge_data.make(options(world, tmp_path / "cut")))


def test_servers_that_fail_end_the_run_and_cost_no_document(world: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], index: int) -> str:
        text = " ".join(message["content"] for message in body["messages"])
        if MARKER in text:
            return f"{MARKER} po po po {len(text)}"
        return "FINAL DECISION: NO" if "zux" in text else "FINAL DECISION: YES"

    with FaultServer(answer=answer) as server:
        flags = {
            "teacher": "http",
            "judge_endpoints": [server.url],
            "judge_served_model": "any",
            "judge_max_attempts": 2,
            "judge_breaker_failures": 999,
        }
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        asyncio.run(make_judge_data.make(options(world, whole, **flags)))
        asked = len(server.seen)
        server.fault = lambda number: "reset" if number >= asked + asked // 2 else ""
        with pytest.raises(JudgeError, match=r"questions got no answer \(transport: .*repeat the command"):
            asyncio.run(make_judge_data.make(options(world, stopped, **flags)))
        assert 0 < len(read(stopped)["quality.train.jsonl"]) < 40
        server.fault = lambda number: "status 401"
        with pytest.raises(JudgeError, match=r"questions got no answer .*401"):
            asyncio.run(make_judge_data.make(options(world, stopped, **flags)))
        server.fault = lambda number: ""
        asyncio.run(make_judge_data.make(options(world, stopped, **flags)))
    assert read(stopped) == read(whole) and len(read(whole)["quality.train.jsonl"]) == 40


class FailingAt(FaultServer):
    """Answers 500 to every prompt that holds one of ``texts``, however often it is asked."""

    texts: Sequence[str] = ()

    async def _respond(self, request: web.Request, fault: str, body: dict[str, Any]) -> web.StreamResponse:
        prompt = body["messages"][-1]["content"]
        broken = any(text in prompt for text in self.texts)
        return await super()._respond(request, "status 500" if broken else fault, body)


@pytest.mark.parametrize(("kind", "num_examples"), [("quality", 2), ("safety", 1)])
def test_documents_that_a_server_fails_at_are_kept_and_asked_about_again(
    kind: str, num_examples: int, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All 40 documents are needed, 10 of them make the server fail: none is lost, and none asked about twice."""
    lines = (world / "corpus.jsonl").read_text().splitlines()[:40]
    names = [f"w{number}w" for number in range(40)]
    texts = [json.loads(line)["text"].split()[:20] for line in lines]
    documents = [{"text": " " + " ".join(w + name for w in text)} for text, name in zip(texts, names, strict=True)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    answered = "FINAL DECISION: YES" if kind == "safety" else f"{MARKER} po po po"
    with FailingAt(answer=lambda body, index: answered) as server:
        server.texts = names[::4]
        values = options(
            world, tmp_path / "made", input=[str(tmp_path / "few.jsonl")], teacher="http", judge_served_model="m",
            judge_endpoints=[server.url], judge_max_attempts=2, judge_breaker_failures=999, example_suffix_length=20,
            **{**dict.fromkeys(WANTED, 0), f"{kind}_train": 80},
        )  # fmt: skip
        assert make_judge_data.report(values, asyncio.run(make_judge_data.make(values))) == 1
        said = capsys.readouterr()
        assert "10 documents without an answer (server: HTTP 500" in said.err and "repeat the command" in said.err
        assert "dropped" not in said.out
        found = Counter(record["document"] for record in read(tmp_path / "made")[f"{kind}.train.jsonl"])
        assert found == dict.fromkeys([number for number in range(40) if number % 4], num_examples)
        server.texts, asked = (), len(server.seen)
        writer = asyncio.run(make_judge_data.make(values))
        assert not writer.waiting and len({json.dumps(seen.body) for seen in server.seen[asked:]}) == 10
    found = Counter(record["document"] for record in read(tmp_path / "made")[f"{kind}.train.jsonl"])
    assert found == dict.fromkeys(range(40), num_examples)


def bench(world: Path, made: Path, output: Path, **changes: Any) -> judge_bench.BenchOptions:
    values = {
        "examples": str(made / "quality.train.jsonl"),
        "output": str(output),
        "tokenizer_model": str(world / "world.model"),
        "judge_model": str(world / "judge.npz"),
        "safety_words": str(world / "unsafe.txt"),
        **changes,
    }
    return from_mapping(judge_bench.BenchOptions, values)


def test_the_bench_asks_each_pair_in_both_orders_and_three_forms_once(world: Path, made: Path, tmp_path: Path) -> None:
    output = tmp_path / "votes.jsonl"
    about, votes = asyncio.run(judge_bench.measure(bench(world, made, output), None))
    assert len(votes) == 20 * 2 * 3 and about["criterion"] == "quality"
    # Cut short, as if it had been stopped: only what is missing is asked again.
    lines = output.read_text().splitlines()
    output.write_text("\n".join(lines[:50]) + '\n{"exam')
    again, complete = asyncio.run(judge_bench.measure(bench(world, made, output), None))
    assert again == about and sorted(map(repr, complete)) == sorted(map(repr, votes))
    assert judge_bench.read_votes(output) == (about, complete)
    with pytest.raises(DataError, match="another judge or prompt"):
        asyncio.run(judge_bench.measure(bench(world, made, output, examples=str(made / "quality.valid.jsonl")), None))
    text = judge_bench.compare([str(output), str(output)])
    assert "book" in text and "wiki" in text and "100.0 %, 1.000, 120" in text


def test_the_word_list_judge_is_right_about_every_safety_example(world: Path, made: Path, tmp_path: Path) -> None:
    asked = bench(world, made, tmp_path / "votes.jsonl", examples=str(made / "safety.train.jsonl"))
    about, votes = asyncio.run(judge_bench.measure(asked, None))
    assert {(vote.form, vote.favoured) for vote in votes} == {("safe", 1.0), ("unsafe", 0.0)}
    assert len(votes) == 12 and "6 (100.0 %)" in judge_bench.describe(about, votes)
    header = judge_bench.describe(about, votes).splitlines()[1]
    assert header.split() == ["judged", "unsafe", "safe"]


def test_factuality_is_asked_of_original_and_corrupted(world: Path, made: Path, tmp_path: Path) -> None:
    asked = bench(world, made, tmp_path / "votes.jsonl", criterion="factuality", num_examples=5)
    about, votes = asyncio.run(judge_bench.measure(asked, None))
    assert Counter(vote.form for vote in votes) == {"suffix": 5, "corrupted": 5}
    assert all(vote.favoured == 1.0 for vote in votes if vote.form == "suffix")
    assert "No Hallucination" in judge_bench.describe(about, votes)


def test_a_bench_that_nobody_answers_says_why_and_fails(
    world: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--examples", str(made / "quality.train.jsonl"), "--output", str(tmp_path / "votes.jsonl")]
    flags += ["--tokenizer-model", str(world / "world.model"), "--teacher", "http", "--judge-served-model", "m"]
    with FaultServer(fault=lambda number: "status 401") as server:
        assert judge_bench.main([*flags, "--judge-endpoints", server.url]) == 1
    captured = capsys.readouterr()
    said = captured.err
    assert not captured.out, "tables of nothing"
    assert "120 of 120 votes asked for; missing ones, for example rejected: HTTP 401" in said
    assert "error: no vote was answered" in said
