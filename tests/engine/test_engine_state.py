"""Saving, loading, skipping and bfloat16.

Covers the faults of torch's AdamW under Megatron's distributed optimizer: a shared ``step`` shows from the second step
after a load, so four are compared.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.engine.settings import PAYLOAD
from tests.ranks import run_ranks

TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loaded_engine_goes_on_bit_for_bit_and_within_rounding_in_another_layout(tmp_path: Path, dtype: str) -> None:
    payload: dict[str, Any] = {**PAYLOAD, "directory": str(tmp_path)}
    payload["model"] = {**PAYLOAD["model"], "bf16": dtype == "bf16"}
    payload["objective"] = {"reference_policy": "ema", "reference_ema_decay": 0.5}
    first, second = run_ranks(2, "tests.engine.claims:save_and_go_on", payload)
    assert first["common"] == second["common"]
    assert first["common"] == {"num_updates": 2, "num_skipped": 0, "consecutive_skips": 0, "reference_version": 2}
    for rank in (first, second):
        assert rank["resumed"] == rank["straight"]
    if dtype == "bf16":
        return
    virtual = {**PP, "num_layers_per_virtual_pipeline_stage": 1}
    for world_size, parallel in ((1, {}), (2, TP), (2, virtual)):
        elsewhere = {**payload, "parallel": parallel, "common": first["common"]}
        for step, (found, wanted) in enumerate(
            zip(run_ranks(world_size, "tests.engine.claims:go_on", elsewhere)[0], first["straight"], strict=True)
        ):
            assert found == pytest.approx(wanted, rel=1e-4), (parallel, step)
    faster = {**payload, "common": first["common"], "lr": 2e-2}
    changed = run_ranks(1, "tests.engine.claims:go_on", faster)[0]
    assert changed[0] == pytest.approx(first["straight"][0], rel=1e-4), "a run with another --lr could not load"
    assert changed[1]["lm loss"] != pytest.approx(first["straight"][1]["lm loss"], rel=1e-4)


def test_weights_alone_can_be_loaded(tmp_path: Path) -> None:
    payload = {**PAYLOAD, "directory": str(tmp_path), "model": {**PAYLOAD["model"], "bf16": True}}
    run_ranks(1, "tests.engine.claims:save_and_go_on", payload)
    found = run_ranks(1, "tests.engine.claims:load_weights_alone", {**payload, "seed": 4})[0]
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
