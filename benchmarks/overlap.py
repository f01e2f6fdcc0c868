#!/usr/bin/env python
"""How much of the judge's time is hidden behind training? (docs/results/judge.md)

``python benchmarks/overlap.py``: whole steps of one rank with a teacher of controlled latency, several rounds of
questions to a step, at judge times from 0 to 150 % of a step's compute; within the step (lookahead 0) and across steps.
``python benchmarks/overlap.py --in-flight 2000``: training beside that many HTTP requests, answered after 20 s.

The trainer runs on one core, the teacher's process (and the server) on another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.checkpoint import StopSignals
from megatron_sip.distributed import initialize
from megatron_sip.teacher import JudgeRequest, JudgeResult, TeacherConfig, TeacherProcess
from megatron_sip.teacher.interfaces import JudgeGroup, Passage
from megatron_sip.train import build
from megatron_sip.train.config import train_config_from
from megatron_sip.train.trainer import Trainer
from tests.train.runs import recipe, write_corpora

_SERVER = """
import os, sys, time
from tests.teacher.http.server import FaultServer
os.sched_setaffinity(0, {int(sys.argv[1])})
with FaultServer(delay_s=float(sys.argv[2])) as server:
    print(server.port, flush=True)
    while True:
        time.sleep(1.0)
"""
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5)
SKIPPED = 2
"""First steps: the queue fills up, memory is allocated."""
MODEL: dict[str, Any] = {
    "hidden_size": 128, "ffn_hidden_size": 384, "num_layers": 4, "max_position_embeddings": 128, "micro_batch_size": 4,
    "rollout_micro_batch_size": 4, "global_batch_size": 32, "seq_length": 96, "eval_interval": 0,
    "phases": [{"name": "all", "ntp": 0.5, "rollout": 0.5}], "candidates": "suffix,rollout:8",
    "pair_schedule": "best_worst", "judge_factuality_weight": 0.0, "log_interval": 10**6,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run, the first two not counted")
    parser.add_argument("--lookahead", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="judge times, parts of the compute")
    parser.add_argument("--in-flight", type=int, default=0, help="requests in flight beside training; 0: the table")
    parser.add_argument("--answer-s", type=float, default=20.0, help="seconds until these are answered")
    parser.add_argument("--trainer-core", type=int, default=0)
    parser.add_argument("--judge-core", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.trainer_core})
    with tempfile.TemporaryDirectory() as folder:
        write_corpora(Path(folder))
        figures = in_flight(options, Path(folder)) if options.in_flight else table(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def table(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Prints and returns a line per lookahead and judge time."""
    rows: list[dict[str, float]] = []
    # The number of rounds follows from the schedule: runs with known times to each tell. They also warm the process up.
    quick, slow = (run(folder, options, 0, round_s, steps=SKIPPED + 3)["judge_s"] for round_s in (0.0, 0.1))
    rounds = round((slow - quick) / 0.1)
    print(f"{rounds} rounds of questions to a step; step, compute, judge and wait in s, medians; {load()}")
    print("lookahead  asked for  judge/compute   step  compute  judge   wait  hidden  limit  step/limit")
    for lookahead in options.lookahead:
        run(folder, options, lookahead, round_s=0.0, steps=options.steps)  # the first is slower
        bare = run(folder, options, lookahead, round_s=0.0, steps=options.steps)
        compute_s = bare["step_s"] - bare["wait_s"]  # the panel's own work is waited for within the step
        for share in options.shares:
            # The panel's own work takes time too: what is asked for is the time from submission to the last verdict.
            round_s = max(0.0, share * compute_s - bare["judge_s"]) / rounds
            found = run(folder, options, lookahead, round_s, options.steps) if share else bare
            judge_s = found["judge_s"]
            exposed_s = max(0.0, judge_s - bare["headroom_s"])
            limit_s = 1.05 * (compute_s + exposed_s if lookahead == 0 else max(compute_s, judge_s))
            rows.append({"lookahead": lookahead, "share": share, "compute_s": compute_s, "limit_s": limit_s, **found})
            print(
                f"{lookahead:9d}  {share:9.0%}  {judge_s / compute_s:13.0%}  {found['step_s']:5.3f}  "
                f"{compute_s:7.3f}  {judge_s:5.3f}  {found['wait_s']:5.3f}  {found['hidden']:6.1%}  "
                f"{limit_s:5.3f}  {found['step_s'] / limit_s:10.3f}",
                flush=True,
            )
    print(load())
    return rows


def load() -> str:
    return "load average of the last 1, 5 and 15 minutes: " + ", ".join(f"{part:.1f}" for part in os.getloadavg())


def run(folder: Path, options: argparse.Namespace, lookahead: int, round_s: float, steps: int) -> dict[str, float]:
    """Medians over the steps that count: those with a full queue before and behind them."""
    with tempfile.TemporaryDirectory() as run_dir:
        changes = {**MODEL, "train_iters": steps + lookahead, "lookahead": lookahead, "run_dir": run_dir}
        train(folder, changes, lambda config: slow_teacher(config, round_s, options.judge_core))
        lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][SKIPPED : steps if lookahead else None]

    def median(name: str) -> float:
        return statistics.median(record[name] for record in records)

    return {
        "step_s": median("iteration-time"),
        "judge_s": median("judge/duration_s"),
        "wait_s": median("judge/exposed_wait_s"),
        "headroom_s": median("judge/headroom_s"),
        "hidden": 1.0 - sum(r["judge/exposed_wait_s"] for r in records) / sum(r["judge/duration_s"] for r in records),
    }


def slow_teacher(config: TeacherConfig, round_s: float, core: int) -> TeacherProcess:
    teacher = TeacherProcess(config, {"round_s": round_s}, factory="benchmarks.slow_teacher:build")
    os.sched_setaffinity(teacher.pid, {core})
    return teacher


_CONTEXT: list[Any] = []


def train(
    folder: Path,
    changes: dict[str, Any],
    teacher: Callable[[TeacherConfig], TeacherProcess | None],
    work: Callable[[Trainer], object] = lambda trainer: trainer.run(),
) -> None:
    """``work`` with the trainer of a recipe, which has ``teacher``."""
    config = train_config_from(recipe(folder, **changes))
    if not _CONTEXT:
        # A rank joins its process groups once.
        _CONTEXT.append(initialize(config.parallel, config.training.seed))
    build.start_teacher = lambda config, tokenizer, context: teacher(config.teacher)
    with StopSignals() as signals, build.build_trainer(config, _CONTEXT[0], signals) as trainer:
        work(trainer)


def in_flight(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Alternates blocks of next-token steps with and without requests in flight; compares their mean times."""
    changes = {**MODEL, "train_iters": 10**6, "run_dir": None, "phases": [{"name": "ntp", "ntp": 1.0}]}
    times: dict[bool, list[float]] = {False: [], True: []}

    def work(trainer: Trainer) -> None:
        trainer._record.open(0)
        for _ in range(SKIPPED):
            trainer._one_step()
        with served(options) as (teacher, request):
            for block in range(4):
                loaded = block % 2 == 1
                until = time.perf_counter() + options.answer_s + 2.0
                if loaded:
                    teacher.submit(block, request)
                while time.perf_counter() < until:
                    started = time.perf_counter()
                    trainer._one_step()
                    times[loaded].append(time.perf_counter() - started)
                if loaded:
                    result = teacher.collect(block)
                    assert isinstance(result, JudgeResult)
                    assert sum(group.num_calls for group in result.groups) == options.in_flight
                    assert not sum(group.num_failures for group in result.groups)

    train(folder, changes, lambda config: None, work)
    means = {f"{name}_{part}_s": figure(times[loaded]) for loaded, part in ((False, "alone"), (True, "beside"))
             for name, figure in (("mean", statistics.mean), ("median", statistics.median))}  # fmt: skip
    slower = {name: means[f"{name}_beside_s"] / means[f"{name}_alone_s"] - 1 for name in ("mean", "median")}
    print(f"{options.in_flight} requests in flight, answered after {options.answer_s:g} s; next-token steps of")
    print(f"mean {means['mean_alone_s']:.4f} s alone, {means['mean_beside_s']:.4f} s beside: {slower['mean']:+.1%}")
    print(f"median {means['median_alone_s']:.4f} s, {means['median_beside_s']:.4f} s: {slower['median']:+.1%}")
    return {**means, **{f"{name}_slower": share for name, share in slower.items()}}


@contextmanager
def served(options: argparse.Namespace) -> Iterator[tuple[TeacherProcess, JudgeRequest]]:
    """A teacher that asks a server of its own, and a request of as many questions as are to be in flight."""
    # A fresh interpreter: this process has threads that a fork would lose.
    command = [sys.executable, "-c", _SERVER, str(options.judge_core), str(options.answer_s)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=sys.path[0])
    assert server.stdout is not None
    port = int(server.stdout.readline())
    config = TeacherConfig(
        teacher="http",
        judge_endpoints=(f"http://127.0.0.1:{port}/v1",),
        judge_served_model="m",
        judge_max_in_flight=options.in_flight,
    )
    words = Passage(np.zeros(0, dtype=np.int64), "a prefix of about two thousand tokens " * 200)
    options_shown = tuple(Passage(words.tokens, text * 20) for text in ("one option ", "another option "))
    groups = tuple(
        JudgeGroup(number, words, options_shown[0], options_shown, ("suffix", "rollout"))
        for number in range(options.in_flight)
    )
    try:
        with TeacherProcess(config) as teacher:
            os.sched_setaffinity(teacher.pid, {options.judge_core})
            yield teacher, JudgeRequest(groups)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"({time.perf_counter() - started:.0f} s)")
