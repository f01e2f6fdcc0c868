"""Whole trainings of a judge and a rewriter: resumed ones equal uninterrupted ones, several updates per batch, layouts.

The gradient itself is compared in tests/engine/test_grpo_layouts.py. Rewards are a stand-in where random weights would
never earn any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.train.teacher_world import recipe, write_world

TP = {"tensor_model_parallel_size": 2}
PASSES = {"batch_passes": 2, "mini_batches": 2, "kl_weight": 0.05}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def run(world_size: int, world: Path, task: str, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    payload = {"task": task, "recipe": recipe(world, task, run_dir=str(run_dir), **changes)}
    return run_ranks(world_size, "tests.train.teacher_world:train", payload)


def test_two_steps_equal_one_and_a_resumed_one_bit_for_bit(world: Path, tmp_path: Path) -> None:
    """Of four updates each: a wrongly restored optimizer shows only from the second on."""
    save = str(tmp_path / "checkpoints")
    flags = {"train_iters": 2, "eval_samples": 4, **TP, **PASSES}
    straight = run(2, world, "judge", tmp_path / "run", save=save, save_interval=1, **flags)
    resumed = run(2, world, "judge", tmp_path / "run", load=save, ckpt_step=1, **flags)
    first, second = straight[0]["records"], resumed[0]["records"]
    assert [record["step"] for record in first] == [record["step"] for record in second] == [0, 1, 2]
    names = ("reward/mean", "loss/grpo", "grad-norm", "grpo/kl_reference", "validation/reward/safety", "grpo/updates")
    for ours, theirs in zip(second, first, strict=True):
        for name in (*names, "consumed-samples", "learning-rate"):
            assert ours.get(name) == theirs.get(name), (name, theirs["step"])
    assert first[2]["grpo/updates"] == 4.0 and first[2]["loss/grpo"] != 0
    for rank in range(2):
        for name, weight in straight[rank]["weights"].items():
            np.testing.assert_array_equal(weight, resumed[rank]["weights"][name], err_msg=name)


def test_replicas_see_the_batch_that_one_rank_sees(world: Path, tmp_path: Path) -> None:
    one = run(1, world, "judge", tmp_path / "one", train_iters=1)[0]["records"]
    two = run(2, world, "judge", tmp_path / "two", train_iters=1)[0]["records"]
    for name in ("reward/mean", "loss/grpo", "grad-norm", "grpo/skipped_no_spread", "rollout/length"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-4, abs=1e-6), name


def test_a_rewriter_is_rewarded_by_the_teachers_process(world: Path, tmp_path: Path) -> None:
    """Real rewards, with the embedded judges; random weights copy nothing and are never unsafe by chance alone."""
    payload = {
        "task": "rewriter",
        "rewarded": False,
        "recipe": recipe(world, "rewriter", run_dir=str(tmp_path), train_iters=1, judge_model=str(world / "judge.npz")),
    }
    (record,) = [r for r in run_ranks(1, "tests.train.teacher_world:train", payload)[0]["records"] if r["step"] == 1]
    quality, safety = record["judge_quality/unsafe"], record["judge_safety/unsafe"]
    assert record["reward/unsafe"] == pytest.approx((quality + safety) / 2)
    assert record["reward/safe"] == record["exact_match/safe"]
    assert 0 <= record["token_overlap/safe"] <= 1 and record["grpo/rewards_missing"] == 0
