#!/usr/bin/env python
"""How much of the rewriter's time does a step wait for? (docs/results/judge.md)

``python benchmarks/rewriter.py``: whole runs of one rank with a rewriter of controlled latency, rewrites asked for when
a step is prepared (--rewrite-lookahead 0) and a step earlier (1, the default), in turn; the judge answers at once. The
trainer runs on one core, the teacher's process on another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.overlap import MODEL, WARM_UP, load, train
from benchmarks.pairs import machine
from megatron_sip.teacher import TeacherConfig, TeacherProcess
from tests.train.runs import write_corpora

SHARES = (0.5, 0.9, 1.5)


def run(folder: Path, options: argparse.Namespace, rewrite_s: float, ahead: int) -> dict[str, float]:
    """Medians over a run's steps: the step, its wait for rewrites, in seconds."""
    with tempfile.TemporaryDirectory() as run_dir:
        changes = {
            **MODEL, "train_iters": WARM_UP + options.steps, "run_dir": run_dir, "rewrite_lookahead": ahead,
            "phases": [{"name": "all", "ntp": 0.25, "rewrite": 0.25, "rollout": 0.5}],
            "candidates": "suffix,rewrite,rollout:8", "rewriter": "rule",
        }  # fmt: skip
        train(folder, changes, lambda config: teacher(config, rewrite_s, options.teacher_core))
        lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # The last step of all has nothing drawn behind it, but has waited like the others.
    records = [json.loads(text) for text in lines][WARM_UP:]
    names = {"step_s": "iteration-time", "wait_s": "rewriter/exposed_wait_s"}
    return {name: statistics.median(record[scalar] for record in records) for name, scalar in names.items()}


def teacher(config: TeacherConfig, rewrite_s: float, core: int) -> TeacherProcess:
    factory = "benchmarks.slow_teacher:build"
    process = TeacherProcess(config, {"round_s": (0.0,), "rewrite_s": rewrite_s}, factory=factory)
    os.sched_setaffinity(process.pid, {core})
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=8, help="of a run that count")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="rewriter's time, parts of a step's")
    parser.add_argument("--trainer-core", type=int, default=0)
    parser.add_argument("--teacher-core", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.trainer_core})
    torch.set_num_threads(1)  # more of them would wait for each other on that core
    print(json.dumps(machine()))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpora(folder)
        bare_s = [run(folder, options, 0.0, 1)["step_s"] for _ in range(3)][-1]
        print(f"a step without latency: {bare_s:.3f} s; medians of {options.pairs} runs in s; {load()}")
        print("rewriter   step, asked late   wait   step, asked a step early   wait   late / early")
        for share in options.shares:
            late, early = [], []
            for _ in range(options.pairs):
                late.append(run(folder, options, share * bare_s, 0))
                early.append(run(folder, options, share * bare_s, 1))
            rows.append({"rewriter_s": share * bare_s, "late": late, "early": early})
            ratios = [a["step_s"] / b["step_s"] for a, b in zip(late, early, strict=True)]
            steps, waits = (
                [statistics.median(found[figure] for found in side) for side in (late, early)]
                for figure in ("step_s", "wait_s")
            )
            print(
                f"{share * bare_s:8.3f}   {steps[0]:16.3f}  {waits[0]:5.3f}   {steps[1]:24.3f}  {waits[1]:5.3f}   "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )
    print(load())
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
