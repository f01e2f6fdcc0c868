#!/usr/bin/env python
"""A whole online-DPO step beside TRL's online-DPO trainer: same model, weights, prompts, judge and optimizer settings.

    python benchmarks/sip_step.py --trl-python PATH/TO/bin/python --prefix 512 --judge-shares 0 0.5 1

A step is rollouts (K = 2 of each prompt), judge, reference log-probs, forward, backward, clipping and AdamW. Ours is
the trainer of a run (sip_step_ours.py), with the judge's verdicts awaited within the step (lookahead 0) and beside the
next step's work (lookahead 1); theirs is ``OnlineDPOTrainer`` as a user would set it up for a CPU (sip_step_trl.py).
Before anything is timed it is checked that both do the same: log-probs of given completions, and losses and gradient
norms of three steps on given completions, the first loss being ln 2.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pairs import Comparison, Side, machine, report
from benchmarks.sip_step_task import NUM_ROLLOUTS, StepReport, Task

OURS, THEIRS = "benchmarks.sip_step_ours", "benchmarks.sip_step_trl"
PHASES = "rollout", "judge", "reference", "train", "optimizer", "rest"
TOLERANCE = {False: 1e-5, True: 2e-2}
"""bf16 or not -> largest difference of a token's log-prob in nats, of a step's loss, and, relative, of the first step's
gradient norm."""
LATER_TOLERANCE = {False: 1e-4, True: 5e-2}
"""The same for gradient norms after updates: AdamW's first ones are nearly +-lr whatever the gradient's size, so that a
gradient near zero, which is rounding alone, moves its weight one way on one side and the other way on the other."""


class Runner:
    """One of the sides, in its process, with what it has said."""

    def __init__(self, name: str, side: Side, task: Task, uncounted: int = 0) -> None:
        """``uncounted``: steps of a turn before the timed one. With lookahead 1 it is 1, as verdicts would otherwise
        come while the other side has its turn."""
        self.name = name
        self.side = side
        self.first_loss = self._step(task)[1].loss  # its time does not count: memory is allocated
        if not abs(self.first_loss - math.log(2)) <= TOLERANCE[task.bf16]:
            raise SystemExit(f"{name}: the first loss is {self.first_loss} and not ln 2")
        self._task = task
        self._uncounted = uncounted
        self.times_s: list[float] = []
        self.reports: list[StepReport] = []

    def turn(self) -> None:
        """Takes its steps and keeps the last one's time and report."""
        for _ in range(self._uncounted):
            self._step(self._task)
        took_s, found = self._step(self._task)
        self.times_s.append(took_s)
        self.reports.append(found)

    def _step(self, task: Task) -> tuple[float, StepReport]:
        took_s, found = self.side.step()
        asked = task.prompts, task.prompts * task.prefix, task.prompts * NUM_ROLLOUTS * task.new_tokens
        if (found.num_prompts, found.prefix_tokens, found.new_tokens) != asked:
            raise SystemExit(f"{self.name}: {found} in place of {asked} prompts, prefix tokens and new tokens")
        return took_s, found

    def phases_s(self) -> dict[str, float]:
        """Medians over the turns."""
        return {phase: statistics.median(report.phases_s[phase] for report in self.reports) for phase in PHASES}


def once(target: str, task: Task, python: str = sys.executable, calls: int = 1) -> list[Any]:
    """What a target's first ``calls`` steps return."""
    side = Side(target, {"task": task}, "wall", python)
    found = [side.step()[1] for _ in range(calls)]
    side.close()
    return found


def check(task: Task, trl_python: str) -> dict[str, Any]:
    """Both sides' work on the same completions. Raises SystemExit if it differs by more than rounding."""
    sides = (OURS, sys.executable), (THEIRS, trl_python)
    ours, theirs = (once(f"{module}:given_work", task, python)[0] for module, python in sides)
    tokens = [[token for row in work.log_probs for token in row] for work in (ours, theirs)]
    losses = [[step.loss for step in work.steps] for work in (ours, theirs)]
    norms_apart = [abs(a.grad_norm / b.grad_norm - 1) for a, b in zip(ours.steps, theirs.steps, strict=True)]
    found = {
        "log_probs_apart": max(abs(a - b) for a, b in zip(*tokens, strict=True)),
        "losses_ours": losses[0],
        "losses_theirs": losses[1],
        "losses_apart": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "first_loss_from_ln2": max(abs(own[0] - math.log(2)) for own in losses),
        "first_grad_norm_apart": norms_apart[0],
        "later_grad_norms_apart": max(norms_apart[1:]),
    }
    print("  checked on given completions: " + ", ".join(f"{name} {_figures(value)}" for name, value in found.items()))
    bounds = dict.fromkeys(
        ("log_probs_apart", "losses_apart", "first_loss_from_ln2", "first_grad_norm_apart"), TOLERANCE[task.bf16]
    )
    for name, bound in {**bounds, "later_grad_norms_apart": LATER_TOLERANCE[task.bf16]}.items():
        if not found[name] <= bound:
            raise SystemExit(f"the sides do not do the same work: {name} is {found[name]}")
    return found


def measure(task: Task, options: argparse.Namespace) -> list[Runner]:
    """All sides in turn, in changing order: lookahead 0 and 1 of ours, and theirs (the last)."""
    runners = []
    for ahead in options.lookahead:
        side = Side(f"{OURS}:training_step", {"task": task, "lookahead": ahead}, "wall")
        runners.append(Runner(f"lookahead {ahead}", side, task, uncounted=ahead))
    runners.append(Runner("TRL", Side(f"{THEIRS}:training_step", {"task": task}, "wall", options.trl_python), task))
    for number in range(options.pairs):
        for runner in runners if number % 2 == 0 else reversed(runners):
            runner.turn()
    for runner in runners:
        runner.side.close()
    return runners


def compared(name: str, runners: Sequence[Runner]) -> list[dict[str, Any]]:
    """Prints a line of each of our runners beside theirs, then the phases; returns rows for JSON."""
    rows = []
    *ours, theirs = runners
    for runner in ours:
        comparison = Comparison(
            f"{name}, {runner.name}", runner.name, theirs.name, runner.times_s, theirs.times_s,
            round(runner.first_loss, 6), round(theirs.first_loss, 6),
        )  # fmt: skip
        print(comparison.line(), flush=True)
        rows.append({**comparison.row(), "ours_phases_s": runner.phases_s(), "theirs_phases_s": theirs.phases_s()})
    for runner in runners:
        print(f"  {runner.name:12}", " ".join(f"{phase} {seconds:.3f}" for phase, seconds in runner.phases_s().items()))
    return rows


def _figures(value: Any) -> str:
    return " ".join(f"{one:.7g}" for one in value) if isinstance(value, list) else f"{value:.1e}"


def main() -> None:
    """Checks and measures every prefix length and judge time asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with the trl package")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--prefix", type=int, nargs="+", default=[512], help="tokens of a prompt [512]")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of a rollout [128]")
    parser.add_argument("--prompts", type=int, default=4, help="of a step; two rollouts each [4]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--judge-shares", type=float, nargs="+", default=[0.0, 0.5, 1.0],
                        help="judge times, parts of our step's compute [0 0.5 1]")  # fmt: skip
    parser.add_argument("--lookahead", type=int, nargs="+", default=[0, 1], choices=(0, 1))
    parser.add_argument("--threads", type=int, default=2, help="of each side [2]")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where each side's CPU time goes instead")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    # Before the sides start.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    rows: list[dict[str, Any]] = []
    for prefix in options.prefix:
        with tempfile.TemporaryDirectory() as folder:
            task = _prepared(options, folder, prefix)
            versions = once(f"{THEIRS}:versions", task, options.trl_python)[0]
            print(f"{machine()}\ntheirs: {versions}\n{replace(task, folder='')}", flush=True)
            if options.profile:
                for module, python in ((OURS, sys.executable), (THEIRS, options.trl_python)):
                    print(once(f"{module}:profile", task, python)[0])
                continue
            checked = check(task, options.trl_python)
            compute_s = statistics.median(
                sum(one.phases_s.values()) for one in once(f"{OURS}:training_step", task, calls=4)
            )
            for share in options.judge_shares:
                timed = replace(task, judge_s=share * compute_s)
                runners = measure(timed, options)
                name = f"prefix {prefix}, judge {timed.judge_s:.2f} s"
                own = {"prefix": prefix, "judge_s": timed.judge_s, "checked": checked, "theirs_versions": versions}
                rows += [{**row, **own} for row in compared(name, runners)]
                report(options.json, rows, vars(options))


def _prepared(options: argparse.Namespace, folder: str, prefix: int) -> Task:
    from benchmarks.sip_step_ours import prepare

    task = Task(
        folder=folder,
        hidden=options.hidden,
        layers=options.layers,
        vocab_size=options.vocab_size,
        prefix=prefix,
        new_tokens=options.new_tokens,
        prompts=options.prompts,
        num_steps=2 * options.pairs + 4,
        bf16=options.precision == "bf16",
    )
    prepare(task)
    return task


if __name__ == "__main__":
    main()
