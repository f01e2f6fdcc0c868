#!/usr/bin/env python
"""Does SIP teach, beside next-token training from the same warm-up with the same token budget?

For each seed: a warm-up by next tokens, then from its checkpoint (a) SIP and (b) the control, next tokens alone with as
many tokens through forward-backward in as many steps; then both are compared on held-out prefixes under the training
judge and under a second judge fitted on other documents. Jobs run one core each, ``--jobs`` at a time.
Needs the data of ``tools/quickstart.py --data-only``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Experiment:
    """One setting: sizes and recipe of both arms."""

    config: Path
    output: Path
    warmup_steps: int
    rollout_steps: int
    curriculum: str
    """Phase of the SIP arm, in the one-line form of ``--curriculum`` without its number of steps."""
    extra: tuple[str, ...]
    num_prefixes: int

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.rollout_steps


def run(command: list[str], log: Path) -> None:
    """Runs a command with its output in ``log``; raises with the log's end if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    with log.open("w") as stream:
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, check=False
        ).returncode
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} ended with status {status}:\n{tail}")


def pretrain(experiment: Experiment, arm: Path, *flags: str) -> None:
    """One training run on one rank with everything under ``arm``; skipped if it has finished."""
    if (arm / "finished.json").exists():
        return
    layout = ["--tensor-model-parallel-size", "1", "--lr-decay-iters", str(experiment.total_steps)]
    command = [sys.executable, "pretrain_sip.py", "--config", str(experiment.config), "--run-dir", str(arm), *layout]
    run([*command, *experiment.extra, *flags], arm / "log.txt")


def metrics(arm: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]


def warm_up(experiment: Experiment, seed: int) -> Path:
    """The checkpoint that both arms start from."""
    arm = experiment.output / f"seed{seed}" / "warmup"
    steps = str(experiment.warmup_steps)
    pretrain(
        experiment,
        arm,
        "--seed",
        str(seed),
        "--curriculum",
        f"ntp:{steps}",
        "--train-iters",
        steps,
        "--probe-interval",
        "0",
    )
    return arm / "checkpoints"


def continue_run(experiment: Experiment, seed: int, name: str, start: Path, phase: str, batch: int | None) -> Path:
    """SIP or control for the rest of the steps."""
    arm = experiment.output / f"seed{seed}" / name
    flags = ["--seed", str(seed), "--load", str(start), "--train-iters", str(experiment.total_steps)]
    flags += ["--curriculum", f"ntp:{experiment.warmup_steps};{phase}:{experiment.rollout_steps}"]
    if batch is not None:
        flags += ["--global-batch-size", str(batch)]
    pretrain(experiment, arm, *flags)
    return arm


def control_batch(sip: Path, warmup_steps: int) -> int:
    """Windows per step, in whole micro-batches, with which the control sees no fewer tokens than SIP did."""
    config = json.loads((sip / "run.json").read_text())["config"]
    micro_batch_tokens = config["training"]["micro_batch_size"] * config["data"]["seq_length"]
    records = [record for record in metrics(sip) if record["step"] > warmup_steps]
    tokens = records[-1]["tokens"] - (records[0]["tokens"] - _tokens_of(records[0]))
    num_micro_batches = math.ceil(tokens / len(records) / micro_batch_tokens)
    return num_micro_batches * config["training"]["micro_batch_size"]


def _tokens_of(record: dict[str, Any]) -> float:
    return float(record["tokens_per_s"] * record["iteration-time"])


def tenth_means(arm: Path, name: str, after: int) -> tuple[float, float]:
    """Mean of a scalar over the first and over the last tenth of the steps after ``after`` that have it."""
    values = [record[name] for record in metrics(arm) if record["step"] > after and record.get(name) is not None]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def evaluate(experiment: Experiment, seed: int, sip: Path, control: Path, data: Path) -> Path:
    """Win rates and guards of SIP against the control on the test split."""
    output = experiment.output / f"seed{seed}" / "evaluation.json"
    if not output.exists():
        command = [sys.executable, "tools/evaluate.py", "--config", str(experiment.config), *experiment.extra]
        command += ["--tensor-model-parallel-size", "1", "--checkpoint", str(sip / "checkpoints")]
        command += ["--baseline", str(control / "checkpoints"), "--test-data-path", str(data / "test_text_document")]
        command += ["--judge", str(data / "judge.npz"), "--second-judge", str(data / "judge2.npz")]
        command += ["--num-prefixes", str(experiment.num_prefixes), "--temperature", "1.0", "0.8", "0"]
        run([*command, "--output", str(output)], output.with_suffix(".log"))
    return output


def one_seed(experiment: Experiment, seed: int, data: Path) -> dict[str, Any]:
    """All runs of one seed and their figures."""
    start, after = warm_up(experiment, seed), experiment.warmup_steps
    sip = continue_run(experiment, seed, "sip", start, experiment.curriculum, None)
    control = continue_run(experiment, seed, "control", start, "ntp", control_batch(sip, after))
    evaluation = json.loads(evaluate(experiment, seed, sip, control, data).read_text())
    warm = [record for record in metrics(start.parent) if "lm loss validation" in record]
    losses = {
        arm.name: [r["lm loss validation"] for r in metrics(arm) if "lm loss validation" in r] for arm in (sip, control)
    }
    return {
        "seed": seed,
        "tokens": {
            arm.name: metrics(arm)[-1]["tokens"] - metrics(start.parent)[-1]["tokens"] for arm in (sip, control)
        },
        "train_chosen_rate": tenth_means(sip, "sip/chosen_rate/rollout", after),
        "probe_chosen_rate": {arm.name: tenth_means(arm, "probe/chosen_rate/rollout", after) for arm in (sip, control)},
        "validation_loss": {"start": warm[-1]["lm loss validation"], **{name: v[-1] for name, v in losses.items()}},
        "evaluation": evaluation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "recipes" / "quickstart.yaml")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "quickstart" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--warmup-steps", type=int, default=300)
    parser.add_argument("--rollout-steps", type=int, default=100)
    parser.add_argument("--curriculum", default="ntp=0.25,rollout=0.75", help="mixture of the SIP arm's steps")
    parser.add_argument("--num-prefixes", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=3, help="seeds at a time, one core each")
    parser.add_argument("extra", nargs="*", help="more flags for pretrain_sip.py, after a lone --")
    options = parser.parse_args()
    experiment = Experiment(
        config=options.config.resolve(),
        output=options.output.resolve(),
        warmup_steps=options.warmup_steps,
        rollout_steps=options.rollout_steps,
        curriculum=options.curriculum,
        extra=tuple(options.extra),
        num_prefixes=options.num_prefixes,
    )
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda seed: one_seed(experiment, seed, options.data.resolve()), options.seeds))
    (experiment.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
