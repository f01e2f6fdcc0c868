#!/usr/bin/env python
"""Plans a run: operations, memory, time and judge GPUs of each part of a step, and how long the whole run takes.

    python tools/plan.py --config examples/recipes/continued-quality.yaml --dry-run-world-size 64 \\
        --hardware examples/hardware/h100.yaml \\
        --judge-server examples/hardware/judges/gpt-oss-120b-h100.yaml --judge-gpus 64
    python tools/plan.py --paper                     # what bounds the paper's runs
    python tools/plan.py --calibrate cpu-here.yaml   # measure this machine by short runs, a few minutes

Takes the flags and recipes of pretrain_sip.py as well (pretrain_sip.py --help lists them). Formulas and their sources:
megatron_sip/train/plan/; how well they meet measured runs: docs/results/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.errors import ConfigurationError, SIPError
from megatron_sip.files import require_folder_of, write_text
from tools._help import HelpFormatter

if TYPE_CHECKING:
    from megatron_sip.train.plan.budget import Budget, JudgePool

ROOT = Path(__file__).resolve().parent.parent
PAPER = (
    ("from scratch, RF-NLL, 1 rollout", "scratch-safety.yaml", (), "llama3.1-8b-h100.yaml"),
    ("continued, DPO, 16 rollouts, all 136 pairs", "continued-quality.yaml", (), "gpt-oss-120b-h100.yaml"),
    ("the same, best_worst with 40 pairs", "continued-quality.yaml",
     ("--pair-schedule", "best_worst", "--pair-budget", "40"), "gpt-oss-120b-h100.yaml"),
    ("the same, one vote and lookahead 1", "continued-quality.yaml",
     ("--pair-schedule", "best_worst", "--pair-budget", "40", "--judge-votes", "1", "--lookahead", "1"),
     "gpt-oss-120b-h100.yaml"),
)  # fmt: skip
"""Name, recipe, further flags, judge server."""
HARDWARE = ROOT / "examples" / "hardware" / "h100.yaml"


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--hardware", type=Path, default=HARDWARE, metavar="YAML", help="the devices that train "
                        f"[{HARDWARE.relative_to(ROOT)}]")  # fmt: skip
    parser.add_argument("--judge-server", type=Path, metavar="YAML", help="the judge's servers [the embedded judge]")
    parser.add_argument("--judge-gpus", type=int, metavar="N", help="GPUs of these servers [one per training rank]")
    parser.add_argument("--prefix-tokens", type=int, metavar="N", help="mean prefix [the corpus's, else the longest]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--paper", action="store_true", help="plan the paper's runs on 64 devices, all in turn")
    parser.add_argument("--calibrate", type=Path, metavar="YAML", help="measure this machine and write its file")
    own, rest = parser.parse_known_args(argv)
    try:
        if own.json is not None:
            require_folder_of(own.json, "--json")
        if own.calibrate is not None:
            from megatron_sip.train.plan.calibrate import calibrate

            calibrate(own.calibrate, rest)
        elif own.paper:
            _paper(own, rest)
        else:
            _plan(own, rest)
    except SIPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0


def _plan(own: argparse.Namespace, rest: Sequence[str]) -> None:
    # Here, so that --help reads no package but this.
    from megatron_sip.train.plan.report import render

    budget = _budget(own, rest)
    print(render(budget), end="")
    if own.json is not None:
        write_text(own.json, json.dumps(budget.as_dict(), indent=1) + "\n")


def _paper(own: argparse.Namespace, rest: Sequence[str]) -> None:
    """Every run of the paper in full, then one line each of what bounds it."""
    from megatron_sip.train.plan.report import render, render_bounds

    budgets = {}
    for name, recipe, flags, server in PAPER:
        chosen = argparse.Namespace(**vars(own))
        chosen.judge_server = own.judge_server or ROOT / "examples" / "hardware" / "judges" / server
        recipe_flags = ["--config", str(ROOT / "examples" / "recipes" / recipe), "--dry-run-world-size", "64"]
        budgets[name] = _budget(chosen, [*recipe_flags, *flags, *rest])
        print(f"=== {name}\n{render(budgets[name])}")
    print(render_bounds(budgets), end="")
    if own.json is not None:
        content = {name: budget.as_dict() for name, budget in budgets.items()}
        write_text(own.json, json.dumps(content, indent=1) + "\n")


def _budget(own: argparse.Namespace, rest: Sequence[str]) -> Budget:
    from megatron_sip.config import load
    from megatron_sip.train.config import TrainConfig
    from megatron_sip.train.plan.budget import plan
    from megatron_sip.train.plan.hardware import load_hardware

    hardware = load_hardware(own.hardware)
    config = load(TrainConfig, rest, prog="plan.py")
    environment = os.environ.get("WORLD_SIZE", str(config.parallel.model_parallel_size))
    world_size = config.training.dry_run_world_size or int(environment)
    return plan(config, hardware, world_size, _pool(own, world_size), own.prefix_tokens)


def _pool(own: argparse.Namespace, world_size: int) -> JudgePool | None:
    from megatron_sip.train.plan.budget import JudgePool
    from megatron_sip.train.plan.hardware import load_judge_server

    if own.judge_gpus is not None and own.judge_gpus < 1:
        raise ConfigurationError(f"--judge-gpus is {own.judge_gpus}: give at least 1, or leave out --judge-server")
    if own.judge_server is None:
        if own.judge_gpus is not None:
            raise ConfigurationError("--judge-gpus needs --judge-server: name a file of examples/hardware/judges/")
        return None
    return JudgePool(load_judge_server(own.judge_server), own.judge_gpus or world_size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
