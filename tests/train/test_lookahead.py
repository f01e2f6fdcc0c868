"""Steps prepared ahead, late verdicts, and a judge that is out of order, in whole small runs.

Covers: staleness and sample counts of lookahead 0, 1 and 2; 3 and 3 resumed steps equal 6, with verdicts in the
checkpoint (embedded judge) and with calls in flight (HTTP judge); another number of replicas; fills and their replay;
faults of every kind, an outage, SIGTERM in it, and a resume before it is over. Verdicts of the HTTP judge depend on
the prompt alone. Does not cover TP and PP, which share one leader's answers, or several nodes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import RankFailure, run_ranks
from tests.teacher.http.server import FaultServer
from tests.train.runs import recipe, write_corpora

STEPS = 6
COUNTED = {"ntp": 4, "suffix": 0, "rewrite": 2, "rollout": 2}
"""Samples of a step of 8."""
CALLS = 2 * 6
"""2 groups of suffix, rewrite and 2 rollouts: 6 pairs each."""
COMPARED = ("lm loss", "loss/rewrite", "loss/dpo", "grad-norm", "params-norm", "sip/score/suffix", "rollout/length")
SMALL: dict[str, Any] = {
    "train_iters": STEPS,
    "global_batch_size": 8,
    "num_layers": 2,
    "phases": [{"name": "all", "ntp": 0.5, "rewrite": 0.25, "rollout": 0.25}],
    "candidates": "suffix,rewrite,rollout:2",
    "judge_factuality_weight": 0.0,
    "rewriter": "rule",
}
PATIENT = {
    "judge_request_timeout_s": 60.0, "judge_read_timeout_s": 60.0, "judge_give_up_s": 90.0, "judge_backoff_s": 0.02,
    "judge_max_backoff_s": 0.1, "judge_breaker_pause_s": 0.2, "judge_max_attempts": 30,
}  # fmt: skip


IMPATIENT = {"judge_give_up_s": 0.5, "judge_max_attempts": 2, "judge_pause_failure_rate": 0.01}
"""For an outage: a call fails soon, and a single one pauses, so that no step loses a verdict wherever it begins."""


OUTAGE_S = float(os.environ.get("TEST_OUTAGE_S", "4"))
"""How long all endpoints are gone; a longer one was tried by hand (docs/results/judge.md)."""


def verdict(body: dict[str, Any], index: int) -> str:
    """Of the prompt alone."""
    prompt = str(body["messages"])
    return f"Conclusion: Option {1 + hashlib.sha256(prompt.encode()).digest()[0] % 2}"


def http(*servers: FaultServer | str, **changes: Any) -> dict[str, Any]:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return {"teacher": "http", "judge_endpoints": urls, "judge_served_model": "m", **PATIENT, **changes}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


def plan(corpora: Path, folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    changes = {key: value for key, value in run.items() if key not in ("recorded", "stop_on", "lost")}
    own = {**SMALL, "run_dir": str(folder), **changes}
    return {**run, "recipe": recipe(corpora, **own)}


def train(corpora: Path, folder: Path, world_size: int = 1, **runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What ``late.train_all`` says of each run, by name."""
    plans = {name: plan(corpora, folder / name, run) for name, run in runs.items()}
    return run_ranks(world_size, "tests.train.late:train_all", {"runs": plans}, timeout_s=240)[0]


def assert_alike(ours: dict[str, Any], theirs: dict[str, Any], first_step: int = 1) -> None:
    """Bit for bit from ``first_step`` on."""
    found = [record for record in ours["records"] if record["step"] >= first_step]
    wanted = [record for record in theirs["records"] if record["step"] >= first_step]
    assert [record["step"] for record in found] == [record["step"] for record in wanted] and found
    for one, other in zip(found, wanted, strict=True):
        for name in (*COMPARED, "consumed-samples", "policy/staleness_versions"):
            assert one.get(name) == other.get(name), (name, one["step"])
    for name, weight in theirs["weights"].items():
        np.testing.assert_array_equal(ours["weights"][name], weight, err_msg=name)


@pytest.fixture(scope="module")
def embedded(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("embedded")
    saved = {"save": str(folder / "saved"), "save_interval": 3}
    runs = {f"ahead {depth}": {"lookahead": depth} for depth in (0, 1)}
    straight = {"lookahead": 2, **saved}
    resumed = {"lookahead": 2, "load": saved["save"], "ckpt_step": 3}
    early = {"reference_scoring": "early", "train_iters": 2}
    return train(corpora, folder, **runs, **{"ahead 2": straight, "resumed": resumed, "early": early})


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_staleness_is_that_of_the_lookahead_and_no_sample_is_dropped_or_judged_in_vain(
    depth: int, embedded: dict[str, dict[str, Any]]
) -> None:
    run = embedded[f"ahead {depth}"]
    for number, record in enumerate(run["records"]):
        # Step 0 is always fresh; the queue fills up before it, and is empty at the end.
        assert record["policy/staleness_steps"] == record["policy/staleness_versions"] == min(number, depth)
        assert record["lookahead/steps_ahead"] == min(depth, STEPS - 1 - number)
        assert record["consumed-samples"] == 8 * (number + 1)
        assert record["judge/calls"] == CALLS and record["judge/comparisons_per_prompt"] == 6
    assert run["consumed"] == {"ntp": STEPS * 4, "sip": STEPS * 4}


def test_rollouts_of_a_lookahead_come_from_older_weights(embedded: dict[str, dict[str, Any]]) -> None:
    fresh, stale = embedded["ahead 0"]["records"], embedded["ahead 1"]["records"]
    # Windows and rewrites are the same samples, and step 0 is the same altogether.
    assert fresh[0]["loss/dpo"] == stale[0]["loss/dpo"] and fresh[1]["lm loss"] == stale[1]["lm loss"]
    assert [r["loss/dpo"] for r in fresh[2:]] != [r["loss/dpo"] for r in stale[2:]]


def test_resumed_steps_equal_straight_ones_bit_for_bit_with_prepared_steps_in_the_checkpoint(
    embedded: dict[str, dict[str, Any]],
) -> None:
    # The judge's running statistics have met both steps: their verdicts are in the checkpoint.
    assert embedded["resumed"]["pending"] == [(3, True), (4, True)]
    assert_alike(embedded["resumed"], embedded["ahead 2"], first_step=4)


def test_reference_log_probs_of_all_candidates_ahead_of_the_verdicts_are_those_of_the_trained_rows(
    embedded: dict[str, dict[str, Any]],
) -> None:
    early, late = embedded["early"]["records"], embedded["ahead 0"]["records"][:2]
    for ours, theirs in zip(early, late, strict=True):
        # The second step's reference is not the policy any more: its margins are not 0.
        for name in ("loss/dpo", "rewards/margins", "grad-norm", "policy/kl_to_reference"):
            assert (name in ours) == (name in theirs), name
            np.testing.assert_allclose(ours.get(name, 0.0), theirs.get(name, 0.0), rtol=1e-4, atol=1e-6, err_msg=name)
    assert abs(late[1]["rewards/margins"]) > 1e-4


def test_calls_in_flight_at_a_save_are_asked_again(corpora: Path, tmp_path: Path) -> None:
    saved = {"save": str(tmp_path / "saved"), "save_interval": 3}
    with FaultServer(answer=verdict, delay_s=1.0) as server:
        straight = {"lookahead": 2, **saved, **http(server)}
        resumed = {"lookahead": 2, "load": saved["save"], "ckpt_step": 3, **http(server)}
        found = train(corpora, tmp_path, straight=straight, resumed=resumed)
        asked = [str(seen.body["messages"]) for seen in server.seen]
    assert [number for number, _ in found["resumed"]["pending"]] == [3, 4]
    assert not found["resumed"]["pending"][-1][1], "it was submitted less than a second before the save"
    assert_alike(found["resumed"], found["straight"], first_step=4)
    assert STEPS * CALLS + CALLS <= len(asked) - 3 * CALLS + CALLS <= STEPS * CALLS + 2 * CALLS


def test_another_number_of_replicas_shares_the_prepared_steps(corpora: Path, tmp_path: Path) -> None:
    run = {"lookahead": 2, "recorded": True, "micro_batch_size": 1, "rollout_micro_batch_size": 1}
    one = train(corpora, tmp_path, one={**run, "save": str(tmp_path / "saved"), "save_interval": 3})["one"]
    resumed = {**run, "load": str(tmp_path / "saved"), "ckpt_step": 3}
    two = train(corpora, tmp_path, world_size=2, two=resumed)["two"]
    assert [step for step, _ in two["pending"]] == [3, 4]
    assert [record["step"] for record in two["records"]] == [4, 5, 6]
    for ours, theirs in zip(two["records"], one["records"][3:], strict=True):
        for name in ("lm loss", "loss/dpo", "grad-norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, err_msg=f"{name} {theirs['step']}")
        for name in ("judge/calls", "consumed-samples", "policy/staleness_steps"):
            assert ours[name] == theirs[name], name


def test_late_steps_are_filled_with_windows_and_the_record_repeats_them(corpora: Path, tmp_path: Path) -> None:
    fill = {"lookahead": 0, "on_late_judgment": "fill", "late_fill_limit": 1.0, "train_iters": 3}
    replay = {**fill, "replay_fills": str(tmp_path / "filled" / "metrics.jsonl")}
    with FaultServer(answer=verdict, delay_s=2.0) as slow, FaultServer(answer=verdict) as quick:
        filled = train(corpora, tmp_path, filled={**fill, **http(slow)})["filled"]
        again = train(corpora, tmp_path, again={**replay, **http(quick)})["again"]
    windows = [record["fill/windows"] for record in filled["records"]]
    assert max(windows) > 0 and all(count % 2 == 0 and count <= 8 for count in windows)
    assert filled["consumed"] == {"ntp": 3 * 4 + sum(windows), "sip": 3 * 4}
    assert filled["records"][-1]["consumed-samples"] == 3 * 8 + sum(windows)
    assert_alike(again, filled)


FAULTS = ("status 500", "retry-after 0.2", "hang", "garbage", "truncated-json", "empty-choices", "reset")


def faulty(number: int) -> str:
    """Every tenth request hangs, two of ten are met with 500, and the others in turn with something else or nothing."""
    place = number % 10
    if place in (1, 6):
        return "status 500"
    if place == 3:
        return "hang"
    return FAULTS[1 + number // 10 % 6].replace("hang", "reset") if place == 8 else ""


def test_faults_of_every_kind_and_one_of_three_endpoints_dead_change_no_verdict(corpora: Path, tmp_path: Path) -> None:
    short = {"judge_read_timeout_s": 1.5, "train_iters": 3, "lookahead": 1, "judge_breaker_failures": 3}
    with FaultServer(answer=verdict) as good:
        straight = train(corpora, tmp_path, good=http(good, **short))["good"]
    numbers = itertools.count()

    def fault(_: int) -> str:
        return faulty(next(numbers))

    with FaultServer(answer=verdict, fault=fault) as bad, FaultServer(answer=verdict, fault=fault) as worse:
        with FaultServer() as dead:
            gone = dead.url
        found = train(corpora, tmp_path, bad=http(bad, gone, worse, **short))
        answered = bad.counts["ok"] + worse.counts["ok"]
        met, served = {*bad.counts, *worse.counts}, len(bad.seen) + len(worse.seen)
    assert_alike(found["bad"], straight)
    records = found["bad"]["records"]
    assert [record["judge/calls"] for record in records] == [CALLS] * 3
    assert [record["judge/failure_rate"] for record in records] == [0.0] * 3
    # Each call was answered once; each fault, and each try at the dead endpoint, was another attempt. Steps overlap:
    # what was counted on the way is in the record of whichever ended first.
    assert answered == 3 * CALLS and met == {"ok", *FAULTS}
    total = {name: sum(record.get(f"judge/{name}", 0) for record in records) for name in ("requests", "attempts")}
    assert total["requests"] == 3 * CALLS and total["attempts"] >= served + 3  # until its breaker opened


@contextmanager
def outage(server: FaultServer, after: int, seconds: float) -> Iterator[None]:
    """The server goes away once it has been asked ``after`` times, for ``seconds`` or, if 0, for good."""
    over, back = threading.Event(), threading.Event()
    # None beyond these is answered, however late the thread comes that stops the server.
    server.fault = lambda number: "reset" if number >= after and not back.is_set() else ""

    def cut() -> None:
        while len(server.seen) < after and not over.is_set():
            time.sleep(0.01)
        server.stop()
        if seconds and not over.wait(seconds):
            back.set()
            server.start_again()

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_training_pauses_while_all_endpoints_are_gone_and_then_goes_on_as_if_they_had_not_been(
    corpora: Path, tmp_path: Path
) -> None:
    quick = {**IMPATIENT, "train_iters": 3, "lookahead": 1}
    with FaultServer(answer=verdict) as server:
        straight = train(corpora, tmp_path, straight=http(server, **quick))["straight"]
    with FaultServer(answer=verdict, delay_s=0.05) as server, outage(server, after=CALLS + 4, seconds=OUTAGE_S):
        paused = {"save": str(tmp_path / "paused-saves"), **http(server, **quick)}
        found = train(corpora, tmp_path, paused=paused)["paused"]
    assert_alike(found, straight)
    words = [text for text in found["said"] if "training pauses" in text]
    assert words and "transport" in words[0] and "--judge-pause-failure-rate" in words[0]
    assert any("training goes on" in text for text in found["said"])
    assert sum(record.get("judge/pauses", 0) for record in found["records"]) == len(words)
    # The state before the step that paused was saved.
    first = int(words[0].split("iteration ")[1].split(":")[0])
    assert found["saved"][0] == f"iter_{first:07}" and first < 3 and found["saved"][-1] == "iter_0000003"


def test_sigterm_of_one_rank_ends_the_pause_of_all_and_the_run_goes_on_from_there(
    corpora: Path, tmp_path: Path
) -> None:
    quick = {**IMPATIENT, "train_iters": 3, "lookahead": 1, "recorded": True}
    quick |= {"micro_batch_size": 1, "rollout_micro_batch_size": 1, "save": str(tmp_path / "saves")}
    with FaultServer(answer=verdict) as server:
        straight = train(corpora, tmp_path, run={**quick, "save": None, **http(server)})["run"]
    with FaultServer(answer=verdict, delay_s=0.05) as server, outage(server, after=CALLS + 4, seconds=0):
        stopped = plan(corpora, tmp_path / "again", {**quick, "stop_on": "training pauses", **http(server, **quick)})
        both = run_ranks(2, "tests.train.late:train_all", {"runs": {"run": stopped}}, timeout_s=240)
    step = both[0]["run"]["end"].step
    for rank in both:
        assert rank["run"]["end"].exit_code == 143 and rank["run"]["end"].step == step < 3
        assert any("training pauses" in text for text in rank["run"]["said"])
    assert both[0]["run"]["saved"] == [f"iter_{step:07}"]
    with FaultServer() as server:
        gone = server.url
    away = {**quick, "load": str(tmp_path / "saves"), **http(gone, **quick), "judge_start_wait_s": 0.0}
    with pytest.raises(RankFailure, match=f"JudgeError: judge endpoint {gone} does not answer .*--judge-start-wait-s"):
        train(corpora, tmp_path / "away", world_size=2, run=away)
    assert [path.name for path in (tmp_path / "saves").glob("iter_*")] == [f"iter_{step:07}"]
    with FaultServer(answer=verdict) as server:
        resumed = {**quick, "load": str(tmp_path / "saves"), **http(server, **quick)}
        found = train(corpora, tmp_path / "one", run=resumed)["run"]
    assert found["pending"][0] == (step, False)
    for ours, theirs in zip(found["records"], straight["records"][step:], strict=True):
        for name in ("step", "lm loss", "loss/dpo", "grad-norm", "consumed-samples"):
            if name not in theirs and name not in ours:  # a step whose pairs are all ties
                continue
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, err_msg=f"{name} {theirs['step']}")


@pytest.mark.parametrize("while_handed_over", [True, False], ids=["weights are handed over", "rollouts are asked for"])
def test_a_run_whose_rollout_servers_are_lost_for_good_has_saved_all_that_it_trained(
    while_handed_over: bool, corpora: Path, tmp_path: Path
) -> None:
    saved = {"save": str(tmp_path / "saved"), "save_interval": 100, "lookahead": 1, "recorded": True}
    found = train(
        corpora, tmp_path, straight={"lookahead": 1, "recorded": True}, lost={**saved, "lost": (3, while_handed_over)},
        resumed={**saved, "load": saved["save"]},
    )  # fmt: skip
    lost = found["lost"]
    # With the weights of three updates; a run of six steps would have saved at its end.
    assert lost["end"] is None and lost["said"][-1] == "the servers are gone" and lost["saved"] == ["iter_0000003"]
    assert found["resumed"]["end"].finished
    assert_alike(found["resumed"], found["straight"], first_step=4)
