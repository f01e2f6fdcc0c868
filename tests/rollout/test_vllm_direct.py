"""Weights over a group of trainer and servers, the servers played: who sends what, and what happens when one is lost.

Covers trainer layouts, several servers, servers that are lost before, in and after a transfer. Gloo is real; whether
vLLM joins it so is seen by tests/vllm. NCCL is played: that it is called as vLLM's side expects, not that it works.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sip.rollout.vllm.packing import cut, packed, unpacked
from tests.ranks import RankFailure, run_ranks
from tests.rollout.played import PlayedServer, choice

LAYOUTS = {1: {}, 2: {}, 4: {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}


@pytest.fixture
def servers() -> Iterator[list[PlayedServer]]:
    played = [PlayedServer(), PlayedServer()]
    for server in played:
        server.info["weight_transfer_config"] = {"backend": "gloo"}
    yield played
    for server in played:
        server.close()


def play(servers: list[PlayedServer], acts: list[Any], world_size: int = 1, **options: Any) -> list[Any]:
    given = {"rollout_weight_transfer": "gloo", "rollout_sync_timeout_s": 8.0, **options}
    payload = {"urls": [server.url for server in servers], "folder": "/nowhere", "acts": acts, "options": given,
               "sizes": LAYOUTS[world_size]}  # fmt: skip
    return run_ranks(world_size, "tests.rollout.vllm_claims:play", payload)


def steering(server: PlayedServer) -> list[str]:
    looks = ("/inference/v1/generate", "/v1/models", "/weight_info", "/health")
    return [path for path, _ in server.calls if path not in looks]


@pytest.mark.parametrize("world_size", [1, 4])
def test_all_servers_get_what_files_would_hold(servers: list[PlayedServer], world_size: int, tmp_path: Path) -> None:
    reports = play(servers, [4, "generate", 5], world_size)
    once = ["/pause?mode=wait", "/update_weight_version", "/start_weight_update", "/update_weights",
            "/finish_weight_update", "/reset_prefix_cache", "/resume"]  # fmt: skip
    first = ["/server_info?config_format=json", "/get_world_size", "/init_weight_transfer_engine"]
    for server in servers:
        assert steering(server) == [*first, *once, *once]  # joined once
        assert [body["weight_version"].partition("-")[0] for body in server.asked("/finish_weight_update")] == [
            "4",
            "5",
        ]
    assert all([one["version"] for one in report["rollouts"][0]] == [4, 4, 4] for report in reports)

    beside = PlayedServer()
    payload = {"urls": [beside.url], "folder": str(tmp_path), "acts": [5], "options": {}, "sizes": LAYOUTS[1]}
    run_ranks(1, "tests.rollout.vllm_claims:play", payload)
    beside.close()
    for server in servers:
        assert server.weights.keys() == beside.weights.keys()
        assert all(torch.equal(server.weights[name], tensor) for name, tensor in beside.weights.items())


def test_one_of_two_servers_that_is_lost_in_a_transfer_is_left_behind_and_rejoins(servers: list[PlayedServer]) -> None:
    servers[1].losses = 1
    reports = play(servers, [4, 5, "generate"], world_size=4)
    once = ["/pause?mode=wait", "/update_weight_version", "/start_weight_update", "/update_weights"]
    rest = ["/finish_weight_update", "/reset_prefix_cache", "/resume"]
    joining = ["/get_world_size", "/init_weight_transfer_engine"]
    # Between the two transfers it is not resumed; what it had begun is ended before it joins anew.
    assert steering(servers[1])[1:] == [*joining, *once, "/finish_weight_update", *joining, *once, *rest]
    assert steering(servers[0])[1:] == [*joining, *once, *rest, *once, *rest]
    for server in servers:
        assert server.version.startswith("5-")
    for report in reports:
        assert [one["version"] for one in report["rollouts"][0]] == [5, 5, 5]


def test_a_lone_server_that_is_lost_in_a_transfer_gets_it_again(servers: list[PlayedServer]) -> None:
    servers[0].losses = 1
    [report] = play(servers[:1], [4, "generate"])
    assert len(servers[0].asked("/update_weights")) == 2
    assert [one["version"] for one in report["rollouts"][0]] == [4, 4, 4]


def test_servers_that_are_lost_again_and_again_end_the_run_with_one_line_on_all_ranks(
    servers: list[PlayedServer],
) -> None:
    for server in servers:
        server.losses = 99
    with pytest.raises(RankFailure, match=r"no rollout server could take version 4-\w+ .*/update_weights") as raised:
        play(servers, [4], world_size=4, rollout_sync_timeout_s=2.5)
    assert str(raised.value).count("RolloutError: no rollout server could take") == 4
    assert all("/resume" not in steering(server) for server in servers)


def test_a_server_that_does_not_take_up_its_chunks_is_given_up_in_time(servers: list[PlayedServer]) -> None:
    def hang(body: Any) -> Any:
        time.sleep(6.0)
        return {}

    servers[0].script["/update_weights"] = [hang]
    started = time.monotonic()
    with pytest.raises(RankFailure, match="no rollout server could take version 4"):
        play(servers[:1], [4], rollout_sync_timeout_s=2.5)
    assert time.monotonic() - started < 40
    assert "/resume" not in steering(servers[0])


def test_a_restarted_server_joins_anew_also_between_two_steps(servers: list[PlayedServer]) -> None:
    server = servers[0]

    def restarted(body: Any) -> Any:
        server.version, server.group = "default", None
        return {"choices": [choice(i, 6, "default") for i in range(3)]}

    server.script["/inference/v1/generate"] = [lambda body: server._generate(body)[1], 400, restarted]
    # Version 8 is the trainer's by now, 7 what the servers had by the interval: the present one is handed over.
    [report] = play(servers[:1], [7, 8, "generate"], rollout_sync_interval=5)
    assert [one["version"] for one in report["rollouts"][0]] == [8, 8, 8]
    assert len(server.asked("/init_weight_transfer_engine")) == 2


def test_a_server_without_the_transfer_is_refused_with_the_command_that_starts_one(servers: list[PlayedServer]) -> None:
    servers[1].info["weight_transfer_config"] = None
    [report] = play(servers, ["refused"])
    assert report["problems"] == [
        f"rollout server {servers[1].url} takes weights by files alone and not by gloo: start it as "
        "tools/export_policy.py --for-rollouts --weight-transfer gloo prints"
    ]
    [report] = play(servers[:1], ["refused"], rollout_weight_transfer="nccl")
    assert "takes weights by gloo and not by nccl" in report["problems"][0]


def test_chunks_end_with_the_tensor_that_exceeds_their_size_and_come_back_whole() -> None:
    tensors = [torch.arange(n, dtype=dtype) for n, dtype in ((3, torch.uint8), (5, torch.float32), (2, torch.int64))]
    tensors.append(torch.arange(24.0).reshape(4, 6).t())  # not contiguous
    entries = [(f"t{i}", tensor.dtype, tuple(tensor.shape)) for i, tensor in enumerate(tensors)]
    # 3, 20, 16 and 96 bytes: 23 exceed 20, then 16 do not, 112 do.
    assert [[name for name, _, _ in chunk] for chunk in cut(entries, 20)] == [["t0", "t1"], ["t2", "t3"]]
    chunks = list(packed(tensors, 20))
    assert [len(chunk) for chunk in chunks] == [23, 112]
    back = [pair for chunk, part in zip(chunks, cut(entries, 20), strict=True) for pair in unpacked(chunk, part)]
    assert [name for name, _ in back] == ["t0", "t1", "t2", "t3"]
    assert all(torch.equal(tensor, found) for tensor, (_, found) in zip(tensors, back, strict=True))
