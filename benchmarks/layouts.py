#!/usr/bin/env python
"""By how much do losses and gradient norms of 10 steps differ between layouts? (docs/results/quickstart.md)

Whole runs of ``pretrain_sip.py``'s parts on small corpora, with recorded rollouts and the embedded judge, in fp32: it
prints the largest relative difference from one rank for every layout and objective.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.ranks import run_ranks
from tests.train.runs import recipe, write_corpora

STEPS = 10
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2x1x1": (2, {TP: 2}),
    "2x1x1 sequence parallel": (2, {TP: 2, "sequence_parallel": True}),
    "1x2x1": (2, {PP: 2}),
    "1x2x1 virtual stages": (2, {PP: 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "1x1x2": (2, {}),
    "2x2x1": (4, {TP: 2, PP: 2}),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "NTP": {"phases": [{"name": "all", "ntp": 1.0}]},
    "RF-NLL + NTP + suffix": {"objective": "rf_nll", "preference_rule": "best", "reference_policy": "frozen"},
    "DPO + NTP + suffix": {},
}
COMPARED = ("lm loss", "loss/suffix", "loss/dpo", "loss/rf_nll", "grad-norm")


def run(world_size: int, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Records of a run by rank 0, with recorded rollouts."""
    with tempfile.TemporaryDirectory() as run_dir:
        changes = {"train_iters": STEPS, "run_dir": run_dir, **changes}
        payload = {"recipe": recipe(folder, **changes), "recorded": True}
        records: list[dict[str, Any]] = run_ranks(world_size, "tests.train.runs:train", payload)[0]["records"]
        return records


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> float | None:
    """Relative, over all steps; None if the run does not log ``name``."""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
    return max(abs(a - b) / abs(b) for a, b in pairs) if pairs else None


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    write_corpora(folder)
    print(f"largest relative difference from 1x1x1 over {STEPS} steps (TP x PP x DP)")
    for objective, changes in OBJECTIVES.items():
        reference = run(1, folder, **changes)
        for layout, (world_size, flags) in LAYOUTS.items():
            records = run(world_size, folder, **changes, **flags)
            found = {name: largest_difference(records, reference, name) for name in COMPARED}
            figures = ", ".join(f"{name} {value:.1e}" for name, value in found.items() if value is not None)
            print(f"{objective:24} {layout:26} {figures}", flush=True)


if __name__ == "__main__":
    main()
