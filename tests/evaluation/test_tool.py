"""tools/evaluate.py from checkpoints to the table: alone, under tensor and under data parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sip.teacher.ngram import fit_ngrams
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from tests.data.corpora import write_corpus
from tests.evaluation.claims import tool
from tests.ranks import run_ranks
from tests.teacher.http.server import FaultServer

VOCAB = 60
NUM_PREFIXES = 24


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A corpus of arithmetic progressions, two judges fitted on such, and a model to match."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB))
    generator = np.random.default_rng(0)
    steps = generator.integers(1, 5, 80)
    documents = [[int(start + i * step) % VOCAB for i in range(24)] for start, step in enumerate(steps)]
    corpus = write_corpus(folder, documents, "test", tokenizer.vocab_size, tokenizer.fingerprint)
    for name, part in (("judge", documents[:40]), ("judge2", documents[40:])):
        lengths = np.full(len(part), 24)
        model = fit_ngrams(np.concatenate(part), lengths, tokenizer.vocab_size, 3, tokenizer.fingerprint)
        model.save(folder / f"{name}.npz")
    options = {
        "tokenizer-type": "NullTokenizer",
        "vocab-size": VOCAB,
        "data-path": folder / "train",  # is not opened
        "test-data-path": corpus,
        "seq-length": 16,
        "suffix-length": 8,
        "min-prefix-length": 4,
        "num-layers": 2,
        "hidden-size": 32,
        "num-attention-heads": 2,
        "num-query-groups": 2,
        "ffn-hidden-size": 64,
        "init-method-std": 0.25,  # far from uniform: greedy margins are wide against rounding
        "judge-model": folder / "judge.npz",
        "quality-judge": "half",
        "train-iters": 1,
        "eval-iters": 0,
    }
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def folder(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies of other seeds, saved at TP 2."""
    folder = tmp_path_factory.mktemp("policies")
    two = [*flags, "--tensor-model-parallel-size", "2"]
    folders = {1: str(folder / "a"), 2: str(folder / "b")}
    run_ranks(2, "tests.evaluation.claims:save_policies", {"flags": two, "folders": folders})
    return folder


@pytest.fixture(scope="module")
def results(flags: list[str], folder: Path) -> dict[str, Any]:
    """They are compared at three layouts; and one with itself."""
    two = [*flags, "--tensor-model-parallel-size", "2"]

    def compare(world_size: int, own: list[str], baseline: str) -> Any:
        second = str(Path(flags[flags.index("--judge-model") + 1]).with_name("judge2.npz"))
        argv = [*own, "--checkpoint", str(folder / "a"), "--baseline", str(folder / baseline), "--second-judge", second]
        argv += ["--num-prefixes", str(NUM_PREFIXES), "--temperature", "1.0", "0", "--num-seeds", "2"]
        argv += ["--output", str(folder / f"{world_size}{len(own)}{baseline}.json")]
        return run_ranks(world_size, "tests.evaluation.claims:run_tool", argv)[0]

    return {
        "alone": compare(1, flags, "b"),
        "tp": compare(2, two, "b"),
        "dp": compare(2, flags, "b"),
        "itself": compare(1, flags, "a"),
    }


def counts(result: dict[str, Any]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (item["decoding"], item["judge"]): tuple(item["win_rate"][key] for key in ("wins", "ties", "losses", "missing"))
        for item in result["comparisons"]
    }


def test_two_judges_compare_every_prefix_at_every_temperature(results: dict[str, Any]) -> None:
    found = counts(results["alone"])
    assert set(found) == {(d, j) for d in ("T=1", "greedy") for j in ("1: judge", "2: judge2")}
    assert {key: sum(values) for key, values in found.items()} == {
        key: NUM_PREFIXES * (2 if key[0] == "T=1" else 1) for key in found
    }
    assert all(item["win_rate"]["low"] < item["win_rate"]["high"] for item in results["alone"]["comparisons"])
    assert results["alone"]["num_prefixes"] == NUM_PREFIXES


def test_the_layout_does_not_matter(results: dict[str, Any]) -> None:
    assert counts(results["tp"]) == counts(results["dp"]) == counts(results["alone"])
    for layout in ("tp", "dp"):
        assert results[layout]["guards"] == results["alone"]["guards"]
        assert results[layout]["suffix_guards"] == results["alone"]["suffix_guards"]


def test_a_policy_ties_with_itself_and_not_with_another(results: dict[str, Any]) -> None:
    itself = counts(results["itself"])
    assert all(values == (0, sum(values), 0, 0) for values in itself.values())
    assert all(item["win_rate"]["rate"] == 0.5 for item in results["itself"]["comparisons"])
    wins, _, losses, _ = counts(results["alone"])["T=1", "1: judge"]
    assert wins and losses


def test_judges_behind_a_server_compare_by_their_served_names(flags: list[str], folder: Path) -> None:
    """Model "first" prefers what it is shown first, "larger" the larger first number; every fifth answer is none."""

    def answer(body: dict[str, Any], index: int) -> str:
        text = body["messages"][0]["content"]
        one, two = (int((text.split(f"<option_{i}>\n")[1].split() or ["0"])[0]) for i in (1, 2))
        return f"Conclusion: Option {1 if body['model'] == 'first' or one > two else 2}"

    def fault(number: int) -> str:
        return "null" if number % 5 == 0 else ""

    with FaultServer(answer=answer, fault=fault) as server:
        argv = [*flags, "--checkpoint", str(folder / "a"), "--baseline", str(folder / "b"), "--teacher", "http"]
        argv += ["--judge-endpoints", server.url, "--judge", "first", "--second-judge", "larger", "--temperature", "0"]
        argv += ["--judge-parse-attempts", "1", "--num-prefixes", str(NUM_PREFIXES), "--pair-order", "both"]
        result = run_ranks(1, "tests.evaluation.claims:run_tool", [*argv, "--output", str(folder / "http.json")])[0]
    found = counts(result)
    assert set(found) == {("greedy", "1: first"), ("greedy", "2: larger")}
    assert {seen.body["model"] for seen in server.seen} == {"first", "larger"} and server.counts["null"] > 5
    wins, ties, losses, missing = found["greedy", "1: first"]
    assert wins + ties + losses + missing == NUM_PREFIXES and ties > NUM_PREFIXES / 3, "both orders cancel out"
    assert sum(found["greedy", "2: larger"]) == NUM_PREFIXES and found["greedy", "2: larger"][1] < NUM_PREFIXES / 3


def test_options_that_cannot_work_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main = tool().main
    pair = ["--checkpoint", "a", "--baseline", "b"]
    without_test = [word for word in flags if word != "--test-data-path"]
    for argv, message in (
        ([*flags, *pair, "--num-prefixes", "0"], "--num-prefixes 0: must be at least 1"),
        ([*flags, *pair, "--sede", "1"], "--seed"),
        ([*without_test[:4], *pair], "--"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_checkpoint_that_is_not_there_is_said_by_its_own_flag_before_anything_starts(
    flags: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("process groups were started")

    monkeypatch.setattr("megatron_sip.distributed.initialize", start)
    there, gone = str(folder / "a"), str(tmp_path / "gone")
    for argv, message in (
        (["--checkpoint", gone, "--baseline", there], f"--checkpoint: no checkpoint in {gone}"),
        (["--checkpoint", there, "--baseline", gone], f"--baseline: no checkpoint in {gone}"),
        # Step 7 is the one that was saved.
        (["--checkpoint", there, "--baseline", there, "--baseline-step", "9"], "load one with --baseline-step 7"),
    ):
        assert tool().main([*flags, *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and "--load" not in error and error.count("\n") == 1
