"""Covers `--replay-judgments` on whole runs: a recorded run again, with no judge at all, bit for bit.

With the embedded judge, whose verdicts depend on what it saw before, and with judges and a rewriter over HTTP that fail
often and never answer the same way twice. Votes fail before, across and after the
checkpoint from which a run is resumed. Does not cover a replay at another layout.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sip.teacher.ledger.files import segments
from tests.ranks import run_ranks
from tests.teacher.http.server import FaultServer
from tests.train.runs import recipe, write_corpora

SAME = ("lm loss", "loss/dpo", "loss/rewrite", "grad-norm", "rewards/margins", "tokens", "rewriter/exact_match",
        "rewriter/failed", "sip/chosen_rate/rollout", "sip/chosen_rate/rewrite", "sip/pairs_skipped",
        "sip/reward/quality_mean", "judge/calls", "judge/comparisons_per_prompt")  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


def run(world_size: int, corpora: Path, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    payload = {"recipe": recipe(corpora, run_dir=str(folder), **changes)}
    return run_ranks(world_size, "tests.train.runs:train", payload)


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], names: tuple[str, ...] = SAME) -> None:
    for left, right in zip(ours[0]["records"], theirs[0]["records"], strict=True):
        for name in names:
            assert left.get(name) == right.get(name), (name, right["step"])
    for left, right in zip(ours, theirs, strict=True):
        for name, weight in right["weights"].items():
            np.testing.assert_array_equal(left["weights"][name], weight, err_msg=name)


def test_a_run_with_the_embedded_judge_is_repeated_without_its_model(corpora: Path, tmp_path: Path) -> None:
    ledger = str(tmp_path / "ledger.sqlite")
    flags = {"train_iters": 4, "global_batch_size": 32, "quality_settings": {"overuse": 3.0}}
    judged = run(2, corpora, tmp_path / "judged", judge_ledger=ledger, ledger_raw="none", **flags)
    before = [(file.path.name, file.path.stat().st_mtime_ns) for file in segments(Path(ledger))]
    assert [name for name, _ in before] == ["ledger.r000.00001.sqlite", "ledger.r001.00001.sqlite"]
    replayed = run(2, corpora, tmp_path / "replayed", judge_model="", replay_judgments=ledger, **flags)
    assert_same(replayed, judged)
    assert all("loss/dpo" in record for record in judged[0]["records"])
    assert [(file.path.name, file.path.stat().st_mtime_ns) for file in segments(Path(ledger))] == before


def unsteady(calls: Any) -> Any:
    """Answers that depend on how often it was asked before."""

    def answer(body: dict[str, Any], index: int) -> str:
        draw = hashlib.sha256(f"{next(calls)}".encode()).digest()
        if "original" in body["messages"][0]["content"]:
            return " ".join(str(byte % 60) for byte in draw[:6])
        return f"Conclusion: Option {1 + draw[0] % 2}"

    return answer


def fault(number: int) -> str:
    return {0: "status 500", 3: "null", 5: "refusal", 8: "status 400"}.get(number % 11, "")


def test_a_run_over_http_with_faults_and_a_resume_is_repeated_with_no_endpoint(corpora: Path, tmp_path: Path) -> None:
    ledger, save = str(tmp_path / "ledger.sqlite"), str(tmp_path / "checkpoints")
    flags = {
        "teacher": "http", "judge_served_model": "m", "candidates": "suffix,rewrite,rollout:2", "judge_votes": 3,
        "judge_parse_attempts": 1, "judge_max_attempts": 1, "judge_vote_requests": "single", "train_iters": 6,
        "judge_breaker_failures": 1000, "judge_factuality_weight": 0.0,
        "phases": [{"name": "all", "ntp": 0.25, "rewrite": 0.25, "rollout": 0.5}],
    }  # fmt: skip
    with FaultServer(answer=unsteady(itertools.count()), fault=fault) as server:
        judged = {"judge_endpoints": [server.url], "judge_ledger": ledger, **flags}
        run(1, corpora, tmp_path / "judged", save=save, save_interval=3, **judged)
        asked = len(server.seen)
        # Steps 4 to 6 again: scores come from the ledger, what failed is asked anew and may now have an answer.
        resumed = run(1, corpora, tmp_path / "judged", load=save, ckpt_step=3, **judged)
        again = len(server.seen) - asked
    assert 0 < again < asked
    replayed = run(1, corpora, tmp_path / "replayed", replay_judgments=ledger, **flags)
    assert_same(replayed, resumed, tuple(name for name in SAME if name != "judge/calls"))
    records = replayed[0]["records"]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert all(record["judge/parse_fail_rate"] > 0.02 for record in records[:3])
    assert any(0 < record["rewriter/failed"] < 1 for record in records)
    assert any(record["sip/chosen_rate/rewrite"] > 0 for record in records)


def failing(number: int) -> str:
    """A vote in seven fails at once, the others take longer than a step: at a save the next step is half judged."""
    return "status 400" if number % 7 == 2 else "slow 0.5"


def test_votes_that_failed_in_a_step_under_way_at_the_save_are_repeated_as_the_resumed_run_met_them(
    corpora: Path, tmp_path: Path
) -> None:
    ledger, save = str(tmp_path / "ledger.sqlite"), str(tmp_path / "checkpoints")
    flags = {
        "teacher": "http", "judge_served_model": "m", "candidates": "suffix,rewrite,rollout:2", "lookahead": 2,
        "judge_parse_attempts": 1, "judge_max_attempts": 1, "judge_factuality_weight": 0.0, "train_iters": 6,
        "judge_breaker_failures": 1000, "num_layers": 2,
        "phases": [{"name": "all", "ntp": 0.25, "rewrite": 0.25, "rollout": 0.5}],
    }  # fmt: skip
    with FaultServer(answer=unsteady(itertools.count()), fault=failing) as server:
        judged = {"judge_endpoints": [server.url], "judge_ledger": ledger, **flags}
        first = {"recipe": recipe(corpora, run_dir=str(tmp_path / "judged"), save=save, save_interval=3, **judged)}
        second = {"recipe": recipe(corpora, run_dir=str(tmp_path / "judged"), load=save, ckpt_step=3, **judged)}
        runs = {"first": first, "second": second}
        found = run_ranks(1, "tests.train.late:train_all", {"runs": runs}, timeout_s=240)[0]
    resumed = found["second"]
    assert any(lost for _, lost in failures_of(ledger, steps=(3, 4, 5)))
    assert [step for step, is_answered in resumed["pending"] if not is_answered], "nothing was under way at the save"
    replays = {
        "straight": {"recipe": recipe(corpora, run_dir=str(tmp_path / "s"), replay_judgments=ledger, **flags)},
        "from the recorded run's checkpoint": {
            "recipe": recipe(
                corpora, run_dir=str(tmp_path / "c"), replay_judgments=ledger, load=save, ckpt_step=3, **flags
            )
        },
    }
    replayed = run_ranks(1, "tests.train.late:train_all", {"runs": replays}, timeout_s=240)[0]
    names = tuple(name for name in SAME if name != "judge/calls")
    assert_same([replayed["straight"]], [resumed], names)
    late = {**resumed, "records": resumed["records"][3:]}
    assert_same([replayed["from the recorded run's checkpoint"]], [late], names)
    assert [record["step"] for record in late["records"]] == [4, 5, 6]


def failures_of(ledger: str, steps: tuple[int, ...]) -> list[tuple[int, bool]]:
    """(step, whether it is marked as lost) of each failed vote."""
    (file,) = segments(Path(ledger))
    with sqlite3.connect(file.path) as db:
        rows = db.execute("SELECT step, lost FROM verdicts WHERE failure IS NOT NULL AND criterion = 'quality'")
        return [(int(step), bool(lost)) for step, lost in rows if step in steps]
