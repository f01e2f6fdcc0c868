"""Real vLLM servers that are lost while ``pretrain_sip.py`` takes its rollouts from them.

Covers one that never was there, one that ends beside another, one that is started anew, and one that is killed while
its workers receive weights. Does not cover servers of several hosts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.between import Between
from tests.vllm.server import VllmServer
from tests.vllm.test_training import SAME
from tests.vllm.training import Home, free_port


class Relay:
    """One URL, behind which one server takes the place of another."""

    def __init__(self, trained: Home, folder: Path) -> None:
        self._trained, self._folder, self._servers = trained, folder, ExitStack()
        self.between = Between("")
        self.start()

    def start(self) -> None:
        """The next server."""
        number = len(list(self._folder.glob("*.log")))
        started = self._trained.server(free_port(), self._folder / f"server-{number}.log")
        self.server = self._servers.enter_context(started)
        self.between.target = self.server.root

    def close(self) -> None:
        self.between.close()
        self._servers.close()


@pytest.fixture(scope="module")
def relay(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    made = Relay(trained, tmp_path_factory.mktemp("relay"))
    yield made
    made.close()


def check(steps: Sequence[dict[str, Any]], number: int) -> None:
    """All steps were done, with rollouts of the weights before each."""
    assert [step["step"] for step in steps] == list(range(1, number + 1))
    assert [step["policy/staleness_versions"] for step in steps] == [0] * number
    assert all(step["rollout/logprob_diff_max"] < SAME for step in steps)


def test_one_of_two_servers_that_never_was_there_is_done_without(
    trained: Home, rollout_server: VllmServer, tmp_path: Path
) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    run = trained.run(tmp_path / "run", [gone, rollout_server.root], train_iters=3)
    check(run.end(200), 3)
    assert "left behind at version 0-" in run.log and gone in run.log


def test_one_of_two_servers_that_ends_in_mid_run_is_done_without(
    trained: Home, rollout_server: VllmServer, tmp_path: Path
) -> None:
    with trained.server(free_port(), tmp_path / "other.log") as other:
        run = trained.run(tmp_path / "run", [other.root, rollout_server.root], train_iters=10)
        run.wait_for_steps(2)
        other.kill()
        steps = run.end(200)
    check(steps, 10)
    assert "left behind at version" in run.log and other.root in run.log


def test_a_run_outlives_a_server_that_is_killed_and_started_anew(trained: Home, relay: Relay, tmp_path: Path) -> None:
    run = trained.run(tmp_path / "killed", [relay.between.url], train_iters=12)
    run.wait_for_steps(2)
    relay.server.kill()
    assert len(run.steps()) < 12, "the run was over before the server was killed"
    relay.start()
    check(run.end(200), 12)


@pytest.mark.parametrize(("transfer", "call"), [("files", "/collective_rpc"), ("gloo", "/update_weights")])
def test_a_run_outlives_a_server_that_is_killed_while_it_receives_weights(
    trained: Home, relay: Relay, tmp_path: Path, transfer: str, call: str
) -> None:
    weights, killed, first = tmp_path / "weights", threading.Event(), relay.server
    weights.mkdir()

    def kill() -> None:
        first.kill()
        killed.set()

    def stop_and_kill() -> None:
        first.stop_workers()  # the call stays under way until they are killed
        threading.Timer(1.0, kill).start()

    relay.between.plan(call, 3, stop_and_kill)
    options = {"rollout_weight_transfer": transfer, "rollout_weights_folder": str(weights)}
    run = trained.run(tmp_path / "run", [relay.between.url], train_iters=5, **options)
    run.wait_for_steps(1)
    assert killed.wait(60), run.log
    relay.start()
    check(run.end(200), 5)
    assert "waiting for a rollout server" in run.log
    assert list(weights.iterdir()) == []
