"""Saving, loading, skipping and bfloat16.

Covers the faults of torch's AdamW under Megatron's distributed optimizer: a shared ``step`` shows from the second step
after a load, so four are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.settings import PAYLOAD
from tests.ranks import run_ranks

VIRTUAL = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}


@dataclass(frozen=True)
class Saved:
    """Two replicas that saved after two steps: what both said, and the settings that load it."""

    ranks: list[dict[str, Any]]
    payload: dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """One checkpoint in each precision."""
    found = {}
    for dtype in ("fp32", "bf16"):
        payload: dict[str, Any] = {**PAYLOAD, "directory": str(tmp_path_factory.mktemp(dtype))}
        payload["model"] = {**PAYLOAD["model"], "bf16": dtype == "bf16"}
        payload["objective"] = {"reference_policy": "ema", "reference_ema_decay": 0.5}
        ranks = run_ranks(2, "tests.engine.claims:save_and_go_on", payload)
        found[dtype] = Saved(ranks, {**payload, "common": ranks[0]["common"]})
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loaded_engine_goes_on_bit_for_bit(saved: dict[str, Saved], dtype: str) -> None:
    for rank in saved[dtype].ranks:
        assert rank["common"] == {"num_updates": 2, "num_skipped": 0, "consecutive_skips": 0, "reference_version": 2}
        assert rank["resumed"] == rank["straight"]


def test_it_goes_on_within_rounding_in_another_layout(saved: dict[str, Saved]) -> None:
    elsewhere = {**saved["fp32"].payload, "parallel": VIRTUAL}
    found = run_ranks(2, "tests.engine.claims:go_on", elsewhere)[0]
    for step, wanted in enumerate(saved["fp32"].ranks[0]["straight"]):
        assert found[step] == pytest.approx(wanted, rel=1e-4), step


def test_it_goes_on_at_another_learning_rate(saved: dict[str, Saved]) -> None:
    straight = saved["fp32"].ranks[0]["straight"]
    found = run_ranks(1, "tests.engine.claims:go_on", {**saved["fp32"].payload, "lr": 2e-2})[0]
    assert found[0] == pytest.approx(straight[0], rel=1e-4)
    assert found[1]["lm loss"] != pytest.approx(straight[1]["lm loss"], rel=1e-4)


def test_weights_alone_can_be_loaded(saved: dict[str, Saved]) -> None:
    found = run_ranks(1, "tests.engine.claims:load_weights_alone", {**saved["bf16"].payload, "seed": 4})[0]
    assert "laid out as dp_reshardable, not as fully_reshardable" in found.pop("refusal of another format")
    assert found == {"changed": True, "reference follows": True, "weights kept": True}


@pytest.mark.parametrize("parallel", [{}, {"overlap_grad_reduce": True, "overlap_param_gather": True}])
def test_a_nan_on_one_replica_skips_the_step_on_all_and_too_many_end_the_run(parallel: dict[str, Any]) -> None:
    payload = {**PAYLOAD, "parallel": parallel, "engine": {"max_skipped_steps": 2}}
    for found in run_ranks(2, "tests.engine.claims:skip_nan", payload):
        assert found["skipped"]
        assert found["unchanged"]
        assert found["counts"] == (0, 1)
        assert not any(skipped for skipped, _ in found["good"])
        assert all(math.isfinite(norm) and norm > 0 for _, norm in found["good"])
        assert "in 3 steps in a row, more than --max-skipped-steps 2, after 2 good steps" in found["error"]


def test_bf16_weights_gather_steps_that_are_smaller_than_their_rounding() -> None:
    # Steps of 1e-4 on weights of about 0.1, whose neighbours in bfloat16 are 5e-4 away: without float32 main weights
    # nearly all of them would be lost.
    payload = {**PAYLOAD, "lr": 1e-4}
    exact = run_ranks(1, "tests.engine.claims:mean_change", payload)[0]
    rounded = run_ranks(1, "tests.engine.claims:mean_change", {**payload, "model": {**PAYLOAD["model"], "bf16": True}})[
        0
    ]
    assert rounded == pytest.approx(exact, rel=0.1)
