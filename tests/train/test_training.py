"""Whole runs: layouts agree, and a run that is resumed equals one that was not interrupted.

Covers TP, PP, DP, virtual stages, several kinds of pass in one step, the teacher's process, checkpoints. Does not
cover bf16, CUDA, HTTP judges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.train.runs import recipe, write_corpora

COMPARED = ("lm loss", "loss/suffix", "loss/dpo", "grad-norm", "sip/chosen_rate/rollout", "rewards/margins", "tokens")
LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 with virtual stages": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "DP2": (2, {}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP2 with sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


def run(
    world_size: int,
    corpora: Path,
    folder: Path,
    recorded: bool = False,
    largest_file: int | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    changes.setdefault("run_dir", str(folder))
    payload = {"recipe": recipe(corpora, **changes), "recorded": recorded, "largest_file": largest_file}
    return run_ranks(world_size, "tests.train.runs:train", payload)


@pytest.fixture(scope="module")
def one_rank(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(1, corpora, tmp_path_factory.mktemp("one"), recorded=True, train_iters=10)[0]["records"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_of_a_run_do_not_depend_on_the_layout(
    layout: str, corpora: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    found = run(world_size, corpora, tmp_path, recorded=True, train_iters=10, **flags)[0]["records"]
    assert len(found) == len(one_rank) == 10
    for ours, theirs in zip(found, one_rank, strict=True):
        for name in COMPARED:
            assert (name in ours) == (name in theirs)
            if name in theirs:
                where = f"{name} at step {theirs['step']}"
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=where)
    assert all(name in one_rank[0] for name in ("lm loss", "loss/dpo", "grad-norm"))


def test_twenty_steps_equal_ten_and_a_resumed_ten_bit_for_bit(corpora: Path, tmp_path: Path) -> None:
    save = str(tmp_path / "checkpoints")
    flags = {"tensor_model_parallel_size": 2, "train_iters": 20}
    straight = run(2, corpora, tmp_path / "run", save=save, save_interval=10, **flags)
    # The logs hold 20 steps by now; resuming at 10 drops the last ten and does them again.
    resumed = run(2, corpora, tmp_path / "run", load=save, ckpt_step=10, **flags)
    first, second = straight[0]["records"], resumed[0]["records"]
    assert [record["step"] for record in second] == list(range(1, 21))
    for ours, theirs in zip(second, first, strict=True):
        for name in (*COMPARED, "consumed-samples", "learning-rate", "rollout/length"):
            assert ours.get(name) == theirs.get(name), (name, theirs["step"])
    for rank in range(2):
        for name, weight in straight[rank]["weights"].items():
            np.testing.assert_array_equal(weight, resumed[rank]["weights"][name], err_msg=name)


def test_a_run_resumed_at_another_layout_goes_on_alike(
    corpora: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    save = str(tmp_path / "checkpoints")
    run(2, corpora, tmp_path / "a", recorded=True, train_iters=5, save=save)
    flags = {"tensor_model_parallel_size": 2, "load": save}
    resumed = run(2, corpora, tmp_path / "b", recorded=True, train_iters=10, **flags)[0]["records"]
    assert [record["step"] for record in resumed] == list(range(6, 11))
    for ours, theirs in zip(resumed, one_rank[5:], strict=True):
        for name in ("lm loss", "loss/dpo", "grad-norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, err_msg=f"{name} {theirs['step']}")


def test_a_warm_up_without_teacher_goes_on_with_rollouts(corpora: Path, tmp_path: Path) -> None:
    save = str(tmp_path / "checkpoints")
    (warm_up,) = run(1, corpora, tmp_path / "a", train_iters=2, save=save, phases=[{"name": "warm-up", "ntp": 1.0}])
    (after,) = run(1, corpora, tmp_path / "b", train_iters=3, load=save, save=save)
    # A copy of the weights that nothing is compared with would only cost memory.
    assert (warm_up["has_reference"], after["has_reference"]) == (False, True)
    records = after["records"]
    assert [record["step"] for record in records] == [3]
    assert "sip/chosen_rate/rollout" in records[0]


def test_a_run_goes_on_after_a_failed_save_but_does_not_end_well_with_one(corpora: Path, tmp_path: Path) -> None:
    flags = {"phases": [{"name": "warm-up", "ntp": 1.0}], "train_iters": 2, "save_interval": 1}
    flags |= {"save": str(tmp_path / "checkpoints"), "on_save_failure": "continue"}
    (found,) = run(1, corpora, tmp_path, largest_file=20_000, **flags)
    assert [record["step"] for record in found["records"]] == [1, 2]
    assert (found["end"].finished, found["end"].exit_code) == (False, 1)
    assert "last checkpoint could not be saved" in found["end"].reason
