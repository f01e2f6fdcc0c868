"""GRPO in every layout equals plain PyTorch on separate sequences.

Covers: rows of a shared prefix and K rollouts of all lengths, several updates per batch of rollouts (so that ratios
leave 1 and are clipped), old log-probs from the trainer, a group of weight 0, the KL to the reference, gradient
accumulation. Gradients are compared by their norm, and by what nine updates made of unseen rows' log-probs. Does not
cover: sampling, CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.settings import PAYLOAD
from tests.ranks import run_ranks

TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
BASE = {**PAYLOAD, "steps": 3, "lr": 3e-3}
MEANS: dict[str, dict[str, Any]] = {
    "sequence": {"loss_mean": "sequence", "kl_weight": 0.1},
    "token": {"loss_mean": "token", "clip_low": 0.1, "clip_high": 0.15},
    "constant": {"loss_mean": "constant"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int, str]] = {
    "1x1x1": (1, {}, 1, "sequence"),
    "1x1x1 four rows, Dr.GRPO": (1, {}, 4, "constant"),
    "2x1x1": (2, TP, 1, "token"),
    "1x2x1": (2, PP, 1, "sequence"),
    "1x1x2": (2, {}, 1, "sequence"),
    "1x1x2 token mean": (2, {}, 2, "token"),
    "2x2x1": (4, {**TP, **PP}, 1, "sequence"),
    "2x1x2 sequence parallel": (4, {**TP, "sequence_parallel": True}, 1, "token"),
    "1x2x2": (4, PP, 1, "constant"),
}


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = run_ranks(1, "tests.engine.grpo:train_plain", {**BASE, "variants": MEANS})[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_equal_plain_pytorch(layout: str, plain: dict[str, dict[str, Any]]) -> None:
    world_size, parallel, size, mean = LAYOUTS[layout]
    payload = {**BASE, "grpo": MEANS[mean], "parallel": parallel, "micro_batch_size": size}
    expected = plain[mean]
    for ours in run_ranks(world_size, "tests.engine.grpo:train", payload):
        for number, (found, wanted) in enumerate(zip(ours["history"], expected["history"], strict=True)):
            named = {name: found[name] for name in wanted}
            assert named == pytest.approx(wanted, rel=1e-4, abs=1e-6), (layout, number)
        assert ours["params-norm"] == pytest.approx(expected["params-norm"], rel=1e-5)
        assert ours["scores"] == pytest.approx(expected["scores"], rel=1e-4)
        assert sum(update["grpo/clipped"] > 0 for update in ours["history"]) >= 2, "no ratio was ever clipped"
