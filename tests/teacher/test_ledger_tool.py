"""Covers tools/ledger.py on a small ledger whose every verdict is known: filters, figures, examples, Parquet."""

import importlib.util
import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_sip.teacher.interfaces import JudgeIdentity, Verdict
from megatron_sip.teacher.ledger import Ledger
from tests.teacher.test_ledger import asked, context

_SPEC = importlib.util.spec_from_file_location("ledger_tool", Path(__file__).parents[2] / "tools" / "ledger.py")
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)
GPT, GUARD = JudgeIdentity("http-quality", "gpt-oss-120b", "T=1"), JudgeIdentity("http-safety", "guard", "T=0")
LOST = Verdict(math.nan, "hm", "unparsable: no verdict in the text", 9.0)


@pytest.fixture
def base(tmp_path):
    """Two replicas; steps 0 to 9; 10 votes of quality a step, the first of which is missing, and one of safety."""
    path = tmp_path / "ledger.sqlite"
    for step in range(10):
        ledger = Ledger(path, replica=step % 2, limit_bytes=60_000)
        about = context(sample_id=100 + step, step=step, texts=("the first text", "the second"))
        votes = [(asked(step, v), (0, 1), Verdict(v / 10, f"raw {step} {v}", latency_s=v)) for v in range(1, 10)]
        ledger.add("quality", GPT, about, [(asked(step, 0), (0, 1), LOST), *votes])
        ledger.add("safety", GUARD, about, [(asked(step, 0), (1,), Verdict(1.0, "fine", latency_s=0.01))])
        ledger.add_hits("safety", GUARD, step, 3)
        ledger.close()
    return str(path)


def run(capsys, *arguments):
    assert tool.main(arguments) == 0
    return capsys.readouterr().out


def records(capsys, *arguments):
    return [json.loads(line) for line in run(capsys, "query", *arguments, "--json", "--limit", "1000").splitlines()]


def test_filters_hold_together(base, capsys):
    assert len(records(capsys, base)) == 110
    assert len(records(capsys, base, "--criterion", "quality")) == 100
    assert len(records(capsys, base, "--judge", "guard")) == 10
    assert len(records(capsys, base, "--failure", "any")) == len(records(capsys, base, "--failure", "unparsable")) == 10
    assert records(capsys, base, "--failure", "server") == []
    assert len(records(capsys, base, "--steps", "3:5")) == 33 and len(records(capsys, base, "--steps", "3")) == 11
    (row,) = records(capsys, base, "--steps", "2:9", "--scores", "0.45:0.55", "--sample", "104")
    assert (row["vote"], row["step"], row["replica"], row["raw"], row["options"]) == (5, 4, 0, "raw 4 5", "0 1")
    assert row["model"] == "gpt-oss-120b" and row["latency_s"] == 5.0 and row["failure"] is None


def test_the_summary_counts_votes_failures_hits_and_latencies(base, capsys):
    quality, safety = run(capsys, "summary", base).split("\n\n")[1:]
    assert "quality: http-quality, model gpt-oss-120b" in quality and "votes         100" in quality
    assert "missing       10 (10.00%): unparsable 10" in quality and "mean score    0.5000" in quality
    # Latencies are 1 to 9 s, ten times each, and ten of 9 s: bins of 1 % give 5 and 9.
    p50, p99 = (float(quality.split(f"{name} ")[1].split()[0]) for name in ("p50", "p99"))
    assert p50 == pytest.approx(5.0, rel=0.01) and p99 == pytest.approx(9.0, rel=0.01)
    assert "cache hits    30 (75.00% of what was asked)" in safety and "missing       0 (0.00%)" in safety


def test_show_prints_texts_and_answers(base, capsys):
    text = run(capsys, "show", base, "--criterion", "quality", "--limit", "1", "--scores", "0.9")
    assert "quality of sample 100, step 0, by http-quality, model gpt-oss-120b" in text
    assert "OPTION 1: candidate 0, suffix\n    the first text" in text and "OPTION 2: candidate 1, rollout" in text
    assert "VOTE 9: score 0.9, after 9 s\n    raw 0 9" in text
    lost = run(capsys, "show", base, "--failure", "any", "--limit", "1")
    assert "VOTE 0: MISSING (unparsable: no verdict in the text), after 9 s\n    hm" in lost


def test_parquet_holds_the_same_rows(base, tmp_path, capsys):
    output = tmp_path / "verdicts.parquet"
    assert "wrote 100 verdicts" in run(capsys, "export", base, "--criterion", "quality", "--output", str(output))
    table = pyarrow.parquet.read_table(output).to_pylist()
    assert len(table) == 100 and sum(row["score"] is None for row in table) == 10
    (row,) = (row for row in table if (row["step"], row["vote"]) == (7, 3))
    assert (row["replica"], row["score"], row["raw"], row["lost"]) == (1, 0.3, "raw 7 3", False)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["summary", "nowhere.sqlite"], "no ledger at nowhere.sqlite"),
        (["query", "BASE", "--scores", "high"], "'high' is no range"),
        (["query", "BASE", "--steps", "9:3"], "write the lower end first"),
        (["query", "BASE", "--failure", "bad"], "invalid choice: 'bad'"),
        (["export", "BASE"], "--output"),
        (["export", "BASE", "--output", "/nowhere/x.parquet"], "cannot be written"),
        (["count", "BASE"], "invalid choice: 'count'"),
    ],
)
def test_bad_input_is_one_line(base, arguments, words, capsys):
    arguments = [base if argument == "BASE" else argument for argument in arguments]
    try:
        status = tool.main(arguments)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1


def test_a_rewriter_gives_no_scores_and_so_has_no_mean(tmp_path, capsys):
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    about = context(sample_id=1, step=0, texts=("the first text", "the second"))
    ledger.add(
        "rewriter",
        JudgeIdentity("rewriter", "m", ""),
        about,
        [(asked(0, 0), (), Verdict(0.0, "a rewrite", latency_s=1.0))],
    )
    ledger.close()
    text = run(capsys, "summary", str(path))
    assert "votes         1" in text and "mean score    -" in text
