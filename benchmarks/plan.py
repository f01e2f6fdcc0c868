#!/usr/bin/env python
"""Step times of real short trainings beside what tools/plan.py plans for them (docs/results/performance.md).

    OMP_NUM_THREADS=1 python benchmarks/plan.py --hardware cpu-here.yaml     # of tools/plan.py --calibrate

Each configuration is trained by pretrain_sip.py on random text, one thread per rank; the times are medians of
``timing/*`` over its steps, the first two not counted. None of its shapes is one of the calibration's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pairs import machine
from megatron_sip.config import load
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.plan.budget import PhaseBudget, plan
from megatron_sip.train.plan.hardware import load_hardware
from megatron_sip.train.plan.trial import run_trial, write_trial

TOLERANCE = 0.20
DPO: dict[str, Any] = {"objective": "online_dpo", "preference_rule": "best_vs_worst", "reference_policy": "frozen"}
RF_NLL: dict[str, Any] = {"objective": "rf_nll", "preference_rule": "best"}
CONFIGURATIONS: dict[str, tuple[int, int, tuple[int, int], dict[str, Any]]] = {
    "A: DPO, hidden 192, K 8, N 32": (
        1, 3000, (80, 160),
        {**DPO, "num_layers": 4, "hidden_size": 192, "num_attention_heads": 6, "num_query_groups": 2,
         "ffn_hidden_size": 512, "seq_length": 128, "suffix_length": 32, "min_prefix_length": 32,
         "candidates": "suffix,rollout:8", "global_batch_size": 16, "micro_batch_size": 8,
         "rollout_batch_size": 128, "curriculum": "ntp=0.25,rollout=0.75"},
    ),
    "B: DPO, hidden 320, K 4, N 64": (
        1, 6000, (200, 320),
        {**DPO, "num_layers": 6, "hidden_size": 320, "num_attention_heads": 5, "ffn_hidden_size": 896,
         "seq_length": 256, "suffix_length": 64, "min_prefix_length": 64, "candidates": "suffix,rollout:4",
         "global_batch_size": 8, "micro_batch_size": 2, "rollout_batch_size": 32,
         "curriculum": "ntp=0.5,rollout=0.5"},
    ),
    "C: RF-NLL, hidden 128, K 1, N 48, batch 32": (
        1, 2000, (100, 240),
        {**RF_NLL, "num_layers": 5, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 344,
         "seq_length": 192, "suffix_length": 48, "min_prefix_length": 48, "candidates": "suffix,rollout:1",
         "global_batch_size": 32, "micro_batch_size": 4},
    ),
    "D: DPO, hidden 256, K 4, N 32, TP 2": (
        2, 3000, (100, 200),
        {**DPO, "num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4,
         "ffn_hidden_size": 640, "seq_length": 160, "suffix_length": 32, "min_prefix_length": 32,
         "candidates": "suffix,rollout:4", "global_batch_size": 16, "micro_batch_size": 4,
         "curriculum": "ntp=0.5,rollout=0.5", "tensor_model_parallel_size": 2},
    ),
    "E: RF-NLL, hidden 224, K 2, N 40, DP 2": (
        2, 4000, (100, 240),
        {**RF_NLL, "num_layers": 4, "hidden_size": 224, "num_attention_heads": 7, "ffn_hidden_size": 616,
         "seq_length": 160, "suffix_length": 40, "min_prefix_length": 40, "candidates": "suffix,rollout:2",
         "global_batch_size": 16, "micro_batch_size": 4, "curriculum": "ntp=0.25,rollout=0.75"},
    ),
    "F: next token, hidden 448, 2 x 384": (
        1, 5000, (300, 500),
        {"num_layers": 3, "hidden_size": 448, "num_attention_heads": 7, "ffn_hidden_size": 1216, "seq_length": 384,
         "suffix_length": 64, "global_batch_size": 8, "micro_batch_size": 2, "curriculum": "ntp"},
    ),
    "G: DPO, hidden 256, K 4, N 32, PP 2": (
        2, 3000, (100, 200),
        {**DPO, "num_layers": 6, "hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4,
         "ffn_hidden_size": 640, "seq_length": 160, "suffix_length": 32, "min_prefix_length": 32,
         "candidates": "suffix,rollout:4", "global_batch_size": 16, "micro_batch_size": 2,
         "curriculum": "ntp=0.5,rollout=0.5", "pipeline_model_parallel_size": 2},
    ),
}  # fmt: skip
"""Name -> (ranks, vocabulary, tokens of a document, recipe)."""
MEASURED = {
    "rollout": ("timing/rollout_s",), "reference": ("timing/reference_s",), "train": ("timing/train_s",),
    "optimizer": ("timing/optimizer_s",), "judge's wait": ("timing/judge_s",), "other": ("timing/other_s",),
}  # fmt: skip


def planned_seconds(phase: PhaseBudget) -> dict[str, float]:
    """The plan's parts, put together as the timers of a run are."""
    found = dict.fromkeys(MEASURED, 0.0)
    for part in phase.parts:
        name = part.name.split(":")[0]
        found[name if name in found else "optimizer"] += part.seconds
    found["judge's wait"] = phase.exposed_s
    return found


def compare(name: str, hardware: Path, steps: int) -> dict[str, Any]:
    """Trains and plans one configuration."""
    ranks, vocabulary, documents, options = CONFIGURATIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_trial(Path(folder), vocabulary, documents, {**options, "train_iters": steps})
        config = load(TrainConfig, ["--config", str(recipe)])
        budget = plan(config, load_hardware(hardware), ranks, pool=None, prefix_tokens=None)
        measured = run_trial(recipe, ranks)
    planned = planned_seconds(budget.phases[0])
    parts = {
        part: {"planned_s": planned[part], "measured_s": sum(measured.get(scalar, 0.0) for scalar in scalars)}
        for part, scalars in MEASURED.items()
    }
    parts["step"] = {"planned_s": budget.phases[0].step_s, "measured_s": measured["iteration-time"]}
    return {"name": name, "ranks": ranks, "parameters": budget.run.num_parameters, "parts": parts,
            "load_average": os.getloadavg()[0]}  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Prints a configuration's table; a part of less than 5 % of the step is not judged."""
    step_s = row["parts"]["step"]["measured_s"]
    print(f"{row['name']} ({row['parameters']:,} parameters, {row['ranks']} rank(s); load {row['load_average']:.1f})")
    for part, times in row["parts"].items():
        planned_ms, measured_ms = times["planned_s"] * 1e3, times["measured_s"] * 1e3
        ratio = planned_ms / measured_ms if measured_ms else float("nan")
        small = times["measured_s"] < 0.05 * step_s and times["planned_s"] < 0.05 * step_s
        verdict = "small" if small else "ok" if 1 - TOLERANCE <= ratio <= 1 + TOLERANCE else "MISSED"
        print(f"  {part:14} planned {planned_ms:9.1f} ms   measured {measured_ms:9.1f} ms   {ratio:5.2f}  {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", type=Path, required=True, help="hardware file of this machine")
    parser.add_argument("--only", nargs="+", help="letters of the configurations (default: all)")
    parser.add_argument("--steps", type=int, default=9, help="steps of each training, the first two not counted")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    print(json.dumps(machine()), flush=True)
    rows = []
    for name in CONFIGURATIONS:
        if options.only and name[0] not in options.only:
            continue
        rows.append(compare(name, options.hardware, options.steps))
        show(rows[-1])
        sys.stdout.flush()
        if options.json is not None:
            content = {"machine": machine(), "results": rows}
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
