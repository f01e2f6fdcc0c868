"""Whole trainings of ``pretrain_sip.py`` whose rollouts come from a real vLLM server, which gets the weights each step.

Covers both transfers that a CPU has, and a server that is killed and started anew. Does not cover NCCL or several
hosts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.training import Home, free_port, home


@pytest.fixture(scope="module")
def trained(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with home(tmp_path_factory.mktemp("training"), vllm_python) as found:
        yield found


def test_rollouts_of_a_training_are_of_the_weights_before_their_step_and_scored_as_by_the_trainer(
    trained: Home, tmp_path: Path
) -> None:
    port = free_port()
    with trained.server(port, tmp_path / "server.log") as server:
        for transfer in ("files", "gloo"):
            run = trained.run(tmp_path / transfer, [server.root], train_iters=4, rollout_weight_transfer=transfer)
            steps = run.end(200)
            print(transfer, [(step["policy/staleness_steps"], step["rollout/logprob_diff_max"]) for step in steps])
            assert [step["step"] for step in steps] == [1, 2, 3, 4]
            for step in steps:
                assert step["policy/staleness_steps"] == 0
                assert step["rollout/logprob_diff_max"] < 1e-4


def test_a_run_outlives_a_server_that_is_killed_and_started_anew(trained: Home, tmp_path: Path) -> None:
    port = free_port()
    with trained.server(port, tmp_path / "first.log") as server:
        run = trained.run(tmp_path / "killed", [server.root], train_iters=12)
        deadline = time.monotonic() + 120
        while len(run.steps()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()
    assert len(run.steps()) < 12, "the run was over before the server was killed"
    with trained.server(port, tmp_path / "second.log"):
        steps = run.end(200)
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert all(step["rollout/logprob_diff_max"] < 1e-4 for step in steps)
