"""Training in every layout equals plain PyTorch training of transformers' Llama.

Covers: next-token, RF-NLL and DPO passes of three shapes mixed in each step (three schedule calls, one reduction),
gradient accumulation, ties, padding, clipping, weight decay, warm-up, the frozen reference, tied embeddings across
stages, recomputation, overlap, the optimizer with and without sharding. Does not cover: CUDA, Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.settings import PAYLOAD
from tests.ranks import run_ranks

TIED = {**PAYLOAD, "model": {**PAYLOAD["model"], "untie_embeddings_and_output_weights": False}}
RECOMPUTED = {**PAYLOAD, "model": {**PAYLOAD["model"], "recompute_granularity": "full"}}
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PP, "num_layers_per_virtual_pipeline_stage": 1}

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "1x1x1": (1, {}, PAYLOAD),
    "1x1x1 two rows, tied": (1, {}, {**TIED, "micro_batch_size": 2}),
    "1x1x1 unsharded optimizer": (1, {"use_distributed_optimizer": False}, PAYLOAD),
    "2x1x1": (2, TP, PAYLOAD),
    "2x1x1 sequence parallel, recomputed": (2, {**TP, "sequence_parallel": True}, RECOMPUTED),
    "1x2x1 tied": (2, PP, TIED),
    "1x2x1 virtual stages": (2, VIRTUAL, PAYLOAD),
    "1x2x1 virtual stages, filled up": (2, VIRTUAL, {**PAYLOAD, "micro_batch_size": 4}),
    "1x1x2": (2, {}, PAYLOAD),
    "1x1x2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, PAYLOAD),
    "2x2x1": (4, {**TP, **PP}, PAYLOAD),
}


@pytest.fixture(scope="module")
def plain() -> dict[bool, dict[str, Any]]:
    """Plain PyTorch's numbers, with tied embeddings or not."""
    return {
        tied: run_ranks(1, "tests.engine.plain:train_plain", TIED if tied else PAYLOAD)[0] for tied in (False, True)
    }


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Our numbers on one rank."""
    return run_ranks(1, "tests.engine.claims:train", PAYLOAD)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_equal_plain_pytorch(
    layout: str, plain: dict[bool, dict[str, Any]], single: dict[str, Any]
) -> None:
    world_size, parallel, payload = LAYOUTS[layout]
    expected = plain["tied" in layout]
    for ours in run_ranks(world_size, "tests.engine.claims:train", {**payload, "parallel": parallel}):
        for step, (found, wanted) in enumerate(zip(ours["history"], expected["history"], strict=True)):
            assert found == pytest.approx(wanted, rel=1e-4), (layout, step)
        assert ours["params-norm"] == pytest.approx(expected["params-norm"], rel=1e-5)
        if "tied" not in layout:
            assert ours["validation"] == pytest.approx(single["validation"], rel=1e-4)
            if "1x1x2" not in layout:  # there each replica has its own rows first
                flat = [value for row in ours["scores"] for values in row for value in values]
                wanted_scores = [value for row in single["scores"] for values in row for value in values]
                assert flat == pytest.approx(wanted_scores, rel=1e-4, abs=1e-5)
