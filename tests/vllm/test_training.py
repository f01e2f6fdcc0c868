"""Whole trainings of ``pretrain_sip.py`` whose rollouts come from a real vLLM server that gets the weights.

Covers both transfers that a CPU has, weights of every second step and a resumed run. Does not cover NCCL or several
hosts; servers that are lost: test_outages.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.vllm.server import VllmServer
from tests.vllm.training import Home

SAME = 1e-4
"""Nats by which a log-prob of vLLM may differ from the trainer's with the same weights."""


def test_rollouts_of_a_training_are_of_the_weights_before_their_step_and_scored_as_by_the_trainer(
    trained: Home, rollout_server: VllmServer, tmp_path: Path
) -> None:
    for transfer in ("files", "gloo"):
        run = trained.run(tmp_path / transfer, [rollout_server.root], train_iters=4, rollout_weight_transfer=transfer)
        steps = run.end(200)
        print(transfer, [(step["policy/staleness_versions"], step["rollout/logprob_diff_max"]) for step in steps])
        assert [step["step"] for step in steps] == [1, 2, 3, 4]
        for step in steps:
            assert step["policy/staleness_versions"] == 0
            assert step["rollout/logprob_diff_max"] < SAME


@pytest.mark.parametrize("transfer", ["files", "gloo"])
def test_weights_of_every_second_step_are_one_step_old_in_between(
    trained: Home, rollout_server: VllmServer, tmp_path: Path, transfer: str
) -> None:
    options = {"train_iters": 6, "rollout_sync_interval": 2, "rollout_weight_transfer": transfer}
    steps = trained.run(tmp_path / "run", [rollout_server.root], **options).end(200)
    differences = [step["rollout/logprob_diff_max"] for step in steps]
    print(transfer, differences)
    assert [step["policy/staleness_versions"] for step in steps] == [0, 1, 0, 1, 0, 1]
    assert max(differences[::2]) < SAME < min(differences[1::2])  # what the tag says is true


def test_a_resumed_run_goes_on_as_one_that_was_never_stopped(
    trained: Home, rollout_server: VllmServer, tmp_path: Path
) -> None:
    saving = {"save": str(tmp_path / "saved"), "save_interval": 3}
    whole = trained.run(tmp_path / "whole", [rollout_server.root], train_iters=6, **saving).end(200)
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "saved/iter_0000003", tmp_path / "half/iter_0000003")
    (tmp_path / "half/latest_checkpointed_iteration.txt").write_text("3\n")
    half = {"load": str(tmp_path / "half"), "pretrained_checkpoint": None, "train_iters": 6}
    resumed = trained.run(tmp_path / "resumed", [rollout_server.root], **half).end(200)
    assert [step["step"] for step in resumed] == [4, 5, 6]
    for before, after in zip(whole[3:], resumed, strict=True):
        assert after["policy/staleness_versions"] == 0 and after["rollout/logprob_diff_max"] < SAME
        losses = [name for name in before if "loss" in name]
        print(after["step"], {name: (before[name], after[name]) for name in losses})
        assert losses
        # Weights, data and seeds are the same; a rollout depends on its batch by rounding alone.
        for name in losses:
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-5), name
    # It hands over its weights at once: with an interval of 2 its fourth step is fresh, where the whole run's is not.
    stale = trained.run(tmp_path / "stale", [rollout_server.root], rollout_sync_interval=2, **half).end(200)
    assert [step["policy/staleness_versions"] for step in stale] == [0, 1, 0]
