#!/usr/bin/env python
"""How a step's cost goes with ranks, and with prefix length, K, N and vocabulary (docs/results/performance.md).

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --json scaling.json

Ranks: whole steps of pretrain_sip.py at 1, 2 and 4 ranks, tensor, pipeline and data parallel; the same global batch.
More ranks than cores share them: such a line says what parallelism costs, not what it gains. Costs: rollouts,
reference (forward alone) and training (forward and backward) of one rank, one of the four sizes changed at a time.
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
from megatron_sip.train.plan.trial import run_trial, write_trial

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1 rank": (1, {}), "TP 2": (2, {TP: 2}), "PP 2": (2, {PP: 2}), "DP 2": (2, {}),
    "TP 4": (4, {TP: 4}), "PP 4": (4, {PP: 4}), "DP 4": (4, {}), "TP 2 x DP 2": (4, {TP: 2}),
}  # fmt: skip
TRIAL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 704,
    "seq_length": 160, "suffix_length": 32, "min_prefix_length": 32, "candidates": "suffix,rollout:4",
    "global_batch_size": 32, "micro_batch_size": 4, "curriculum": "ntp=0.5,rollout=0.5", "objective": "online_dpo",
    "preference_rule": "best_vs_worst", "reference_policy": "frozen", "rollout_batch_size": 64,
}  # fmt: skip
PARTS = ("rollout", "reference", "train", "optimizer", "judge", "other")
MODEL: dict[str, Any] = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "ffn_hidden_size": 704}
BASE = {"prefix": 256, "K": 4, "N": 32, "vocabulary": 4000}
SWEEPS = {
    "prefix": (64, 128, 256, 512, 1024), "K": (1, 2, 4, 8, 16), "N": (8, 16, 32, 64, 128),
    "vocabulary": (1000, 4000, 16000, 64000),
}  # fmt: skip
GROUPS = 4
"""Prefixes decoded together, and rows of a micro-batch."""


def ranks_table(steps: int, names: list[str] | None) -> list[dict[str, Any]]:
    """Seconds of a step and its parts per layout."""
    rows: list[dict[str, Any]] = []
    print(f"\n{'layout':12} {'step ms':>8} {'x':>5}  " + " ".join(f"{part:>9}" for part in PARTS) + "   (ms)")
    for name, (ranks, flags) in LAYOUTS.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_trial(Path(folder), 4000, (100, 200), {**TRIAL, **flags, "train_iters": steps})
            found = run_trial(recipe, ranks)
        row: dict[str, Any] = {"layout": name, "ranks": ranks, "step_s": found["iteration-time"]}
        row |= {part: found.get(f"timing/{part}_s", 0.0) for part in PARTS}
        rows.append(row)
        speedup = rows[0]["step_s"] / row["step_s"]
        shared = "" if ranks <= (os.cpu_count() or 1) else f"   {ranks} ranks on {os.cpu_count()} cores"
        parts = " ".join(f"{row[part] * 1e3:9.1f}" for part in PARTS)
        print(f"{name:12} {row['step_s'] * 1e3:8.1f} {speedup:5.2f}  {parts}{shared}", flush=True)
    return rows


def cost_table() -> list[dict[str, Any]]:
    """Seconds of rollouts, reference and training, one size changed at a time."""
    from megatron_sip.distributed import ParallelConfig, initialize

    context = initialize(ParallelConfig(), seed=1)
    rows: list[dict[str, Any]] = []
    print(f"\n{GROUPS} prefixes; base {BASE}; DPO rows of two candidates; ms")
    print(f"{'changed':18} {'prefill':>9} {'decode':>9} {'per token':>9} {'reference':>9} {'train':>9}")
    for name, values in SWEEPS.items():
        for value in values:
            row: dict[str, Any] = {"changed": name, "value": value, **_costs({**BASE, name: value}, context)}
            rows.append(row)
            print(
                f"{name + ' ' + format(value, ','):18} {row['prefill_s'] * 1e3:9.1f} {row['decode_s'] * 1e3:9.1f} "
                f"{row['decode_s'] / max(1, {**BASE, name: value}['N'] - 1) * 1e3:9.2f} "
                f"{row['reference_s'] * 1e3:9.1f} {row['train_s'] * 1e3:9.1f}",
                flush=True,
            )
    context.shutdown()
    return rows


def _costs(sizes: dict[str, int], context: Any) -> dict[str, float]:
    from dataclasses import replace

    import torch

    from megatron_sip.objectives import OnlineDPO
    from megatron_sip.train.plan.runs import Bench, Clock
    from megatron_sip.types import TrainPass

    clock = Clock(context)
    bench = Bench(MODEL, sizes["vocabulary"], context, bf16=False)
    short = bench.requests(GROUPS, sizes["K"], sizes["prefix"], 1)
    whole = bench.requests(GROUPS, sizes["K"], sizes["prefix"], sizes["N"])
    prefill_s = clock(lambda: bench.rollouts.generate(short))
    all_s = clock(lambda: bench.rollouts.generate(whole))
    rows = bench.rows(GROUPS, sizes["prefix"], 2, sizes["N"])
    batches = tuple(replace(b, reference_log_probs=torch.full_like(b.mask, -5.0)) for b in rows)
    train_pass = TrainPass("scaling", batches, OnlineDPO(beta=0.1), 1e-3)
    bench.engine.begin_step()
    return {
        "prefill_s": prefill_s,
        "decode_s": max(all_s - prefill_s, 0.0),
        "reference_s": clock(lambda: bench.engine.score(rows)),
        "train_s": clock(lambda: bench.engine.run(train_pass, last=False)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="steps of each training, the first two not counted")
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), help="only these (default: all)")
    parser.add_argument("--part", choices=("ranks", "costs", "both"), default="both")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    print(json.dumps(machine()))
    results: dict[str, Any] = {}
    if options.part != "ranks":
        results["costs"] = cost_table()
    if options.part != "costs":
        results["ranks"] = ranks_table(options.steps, options.layouts)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
