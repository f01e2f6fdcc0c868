#!/usr/bin/env python
"""How much of the judge's time is hidden behind training? (docs/results/judge.md)

``python benchmarks/overlap.py``: whole steps of one rank with a teacher of controlled latency, several rounds of
questions to a step, at judge times from 0 to 150 % of a step's compute; within the step (lookahead 0) and across steps.
One run holds all rows: a block of steps of each between two blocks without latency, which say what compute is there
and then; round by round, in changing order. A row's figure is the median of its blocks' ratios.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
WARM_UP = 4
"""First steps of a run: the queue fills up, memory is allocated."""
MODEL: dict[str, Any] = {
    "hidden_size": 128, "ffn_hidden_size": 384, "num_layers": 4, "max_position_embeddings": 128, "micro_batch_size": 4,
    "rollout_micro_batch_size": 4, "global_batch_size": 32, "seq_length": 96, "eval_interval": 0,
    "phases": [{"name": "all", "ntp": 0.5, "rollout": 0.5}], "candidates": "suffix,rollout:8",
    "pair_schedule": "best_worst", "judge_factuality_weight": 0.0, "log_interval": 10**6,
    "lr": 1e-6,  # what is trained is not the matter: every step is to take as long as the one before
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=5, help="of each row, and pairs of blocks with --in-flight")
    parser.add_argument("--steps", type=int, default=5, help="of a block that count")
    parser.add_argument("--lookahead", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="judge times, parts of the compute")
    parser.add_argument("--in-flight", type=int, default=0, help="requests in flight beside training; 0: the table")
    parser.add_argument("--answer-s", type=float, default=20.0, help="seconds until these are answered")
    parser.add_argument("--trainer-core", type=int, default=0)
    parser.add_argument("--judge-core", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.trainer_core})
    torch.set_num_threads(1)  # more of them would wait for each other on that core
    with tempfile.TemporaryDirectory() as folder:
        write_corpora(Path(folder))
        figures = in_flight(options, Path(folder)) if options.in_flight else table(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """Medians over the steps of one block that count, in seconds."""

    step_s: float
    judge_s: float
    wait_s: float
    headroom_s: float
    total_wait_s: float
    total_judge_s: float

    @property
    def compute_s(self) -> float:
        """What the panel itself works is waited for within the step."""
        return self.step_s - self.wait_s


def table(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Prints and returns a line per lookahead and judge time."""
    rows: list[dict[str, float]] = []
    # The number of rounds follows from the schedule: known times to each tell. The first block warms the process up.
    _, slow, bare = blocks_of(folder, options, 0, [0.0, 0.1, 0.0])
    rounds = round((slow.judge_s - bare.judge_s) / 0.1)
    print(f"{rounds} rounds of questions to a step; times in s, medians of {options.blocks} blocks; {load()}")
    print("lookahead  asked for  judge/compute   step  compute  judge   wait  hidden  limit  step/limit (of blocks)")
    for lookahead in options.lookahead:
        # The panel's own work, all that there is at 0, falls into the time in which other groups wait.
        latencies = [share * bare.compute_s / rounds for share in options.shares]
        orders = [[(i + turn) % len(latencies) for i in range(len(latencies))] for turn in range(options.blocks)]
        asked = [latencies[row] for order in orders for row in order]
        found = blocks_of(folder, options, lookahead, [0.0, *(x for latency in asked for x in (latency, 0.0))])
        between = list(zip(found[:-2:2], found[1::2], found[2::2], strict=True))
        owners = [row for order in orders for row in order]
        for row, share in enumerate(options.shares):
            own = [triple for triple, owner in zip(between, owners, strict=True) if owner == row]
            rows.append({"lookahead": lookahead, "share": share, **figures(lookahead, own)})
            print(line(rows[-1]), flush=True)
    print(load())
    return rows


def figures(lookahead: int, blocks: Sequence[tuple[Block, Block, Block]]) -> dict[str, Any]:
    """Of a row: each of its blocks with the ones without latency before and after it."""
    parts: list[dict[str, float]] = []
    for before, block, after in blocks:
        compute_s = (before.compute_s + after.compute_s) / 2
        exposed_s = max(0.0, block.judge_s - (before.headroom_s + after.headroom_s) / 2)
        limit_s = 1.05 * (compute_s + exposed_s if lookahead == 0 else max(compute_s, block.judge_s))
        parts.append({
            "compute_s": compute_s, "limit_s": limit_s, "step_s": block.step_s, "judge_s": block.judge_s,
            "wait_s": block.wait_s, "share_of_compute": block.judge_s / compute_s, "ratio": block.step_s / limit_s,
        })  # fmt: skip
    row: dict[str, Any] = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    waited_s, judged_s = (sum(getattr(b, name) for _, b, _ in blocks) for name in ("total_wait_s", "total_judge_s"))
    return row | {"hidden": 1.0 - waited_s / judged_s, "ratios": sorted(part["ratio"] for part in parts)}


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['lookahead']:9d}  {row['share']:9.0%}  {row['share_of_compute']:13.0%}  {row['step_s']:5.3f}  "
        f"{row['compute_s']:7.3f}  {row['judge_s']:5.3f}  {row['wait_s']:5.3f}  {row['hidden']:6.1%}  "
        f"{row['limit_s']:5.3f}  {row['ratio']:10.3f} ({' '.join(f'{ratio:.3f}' for ratio in row['ratios'])})"
    )


def load() -> str:
    return "load average of the last 1, 5 and 15 minutes: " + ", ".join(f"{part:.1f}" for part in os.getloadavg())


def blocks_of(folder: Path, options: argparse.Namespace, lookahead: int, round_s: Sequence[float]) -> list[Block]:
    """One run with a block of steps for each latency of a round; its first steps were prepared in the block before."""
    size = options.steps + lookahead + 1
    latencies = [0.0] * WARM_UP + [latency for latency in round_s for _ in range(size)]
    with tempfile.TemporaryDirectory() as run_dir:
        # The last steps have nothing prepared behind them: more are trained than count.
        asked = [*latencies, *[0.0] * lookahead]
        changes = {**MODEL, "train_iters": len(asked), "lookahead": lookahead, "run_dir": run_dir}
        train(folder, changes, lambda config: slow_teacher(config, asked, options.judge_core))
        lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(text) for text in lines][WARM_UP : len(latencies)]
    return [block(records[start + lookahead + 1 : start + size]) for start in range(0, len(records), size)]


def block(records: Sequence[dict[str, float]]) -> Block:
    def values(name: str) -> list[float]:
        return [record[f"judge/{name}"] for record in records]

    return Block(
        step_s=statistics.median(record["iteration-time"] for record in records),
        judge_s=statistics.median(values("duration_s")),
        wait_s=statistics.median(values("exposed_wait_s")),
        headroom_s=statistics.median(values("headroom_s")),
        total_wait_s=sum(values("exposed_wait_s")),
        total_judge_s=sum(values("duration_s")),
    )


def slow_teacher(config: TeacherConfig, round_s: Sequence[float], core: int) -> TeacherProcess:
    teacher = TeacherProcess(config, {"round_s": tuple(round_s)}, factory="benchmarks.slow_teacher:build")
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


def in_flight(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pairs of blocks of next-token steps, with and without requests in flight, in changing order."""
    changes = {**MODEL, "train_iters": 10**6, "run_dir": None, "phases": [{"name": "ntp", "ntp": 1.0}]}
    pairs: list[dict[bool, list[float]]] = []

    def steps(trainer: Trainer, until: float) -> list[float]:
        times = []
        while time.perf_counter() < until:
            started = time.perf_counter()
            trainer._one_step()
            times.append(time.perf_counter() - started)
        return times

    def work(trainer: Trainer) -> None:
        trainer._record.open(0)
        for _ in range(WARM_UP):
            trainer._one_step()
        with served(options) as (teacher, request):
            for pair in range(options.blocks):
                found: dict[bool, list[float]] = {}
                for loaded in (False, True) if pair % 2 == 0 else (True, False):
                    until = time.perf_counter() + options.answer_s + 1.0
                    if loaded:
                        teacher.submit(pair, request)
                    found[loaded] = steps(trainer, until)
                    if loaded:
                        check_all_answered(teacher, pair, options.in_flight)
                pairs.append(found)

    train(folder, changes, lambda config: None, work)
    print(
        f"{options.in_flight} requests in flight, answered after {options.answer_s:g} s; times of steps in s; {load()}"
    )
    rows: dict[str, Any] = {}
    for name, figure in (("mean", statistics.mean), ("median", statistics.median)):
        alone, beside = ([figure(pair[loaded]) for pair in pairs] for loaded in (False, True))
        slower = [with_ / without - 1 for without, with_ in zip(alone, beside, strict=True)]
        rows[name] = {"alone_s": alone, "beside_s": beside, "slower": slower}
        print(
            f"{name:6} {statistics.median(alone):.4f} alone, {statistics.median(beside):.4f} beside: "
            f"{statistics.median(slower):+.1%} (of each pair {' '.join(f'{share:+.1%}' for share in slower)})"
        )
    return rows


def check_all_answered(teacher: TeacherProcess, ticket: int, count: int) -> None:
    result = teacher.collect(ticket)
    assert isinstance(result, JudgeResult)
    assert sum(group.num_calls for group in result.groups) == count
    assert not sum(group.num_failures for group in result.groups)


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
