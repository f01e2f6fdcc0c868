"""The vLLM engine beside a server that is played: what it is asked, in which order, and what its failures become.

Whether vLLM itself understands it so is seen by tests/vllm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sip.errors import ConfigurationError
from megatron_sip.huggingface.config_json import config_of
from megatron_sip.model import ModelConfig
from megatron_sip.rollout import RolloutConfig
from megatron_sip.rollout.vllm.servers import read_answer
from megatron_sip.teacher.http.failures import Failure
from tests.ranks import RankFailure, run_ranks
from tests.rollout import vllm_claims
from tests.rollout.played import PlayedServer, choice
from tests.rollout.vllm_claims import EOD, PREFIX, VOCAB


@pytest.fixture
def server() -> Iterator[PlayedServer]:
    played = PlayedServer()
    yield played
    played.close()


def play(server: PlayedServer, folder: Path, acts: list[Any], world_size: int = 1, **options: Any) -> list[Any]:
    """Reports of the ranks; ``acts`` are versions to sync and the word "generate"."""
    payload = {"urls": [server.url], "folder": str(folder), "acts": acts, "options": options, "sizes": {}}
    if world_size == 4:
        payload["sizes"] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    return run_ranks(world_size, "tests.rollout.vllm_claims:play", payload)


def test_weights_are_handed_over_paused_then_tagged_then_the_prefix_cache_is_emptied(
    server: PlayedServer, tmp_path: Path
) -> None:
    reports = play(server, tmp_path, [4, "generate", 5, "generate"], world_size=4)
    control = [path for path, _ in server.calls if path not in ("/inference/v1/generate", "/v1/models")]
    once = ["/weight_info", "/pause?mode=wait", "/update_weight_version", "/collective_rpc", "/update_weight_version",
            "/reset_prefix_cache", "/resume"]  # fmt: skip
    assert control == ["/server_info?config_format=json", *once, *once]
    first, second = server.asked("/collective_rpc")
    assert first["method"] == "reload_weights"
    fourth, fifth = (one["kwargs"]["weights_path"].rpartition("/version-")[2] for one in (first, second))
    assert fourth.startswith("4-") and fifth.startswith("5-")
    # Marked while half updated, then named after step and run.
    assert [body["new_version"] for body in server.asked("/update_weight_version")] == [
        f"updating to {fourth}", fourth, f"updating to {fifth}", fifth
    ]  # fmt: skip
    # Four ranks wrote two files; what the server read is the model without the padding of its vocabulary.
    assert server.weights["model.embed_tokens.weight"].shape == (VOCAB, 32)
    assert {name.split(".")[2] for name in server.weights if ".layers." in name} == {"0", "1"}
    for report in reports:
        assert report["rollouts"] == reports[0]["rollouts"]
        assert [one["version"] for one in report["rollouts"][1]] == [5, 5, 5]
    assert reports[0]["files"] == ["config.json", "model-00001-of-00002.safetensors",
                                   "model-00002-of-00002.safetensors", "model.safetensors.index.json"]  # fmt: skip
    assert list(tmp_path.iterdir()) == []  # removed at the end


def test_replicas_ask_for_themselves_and_the_first_hands_over(server: PlayedServer, tmp_path: Path) -> None:
    reports = play(server, tmp_path, [4, "generate"], world_size=2)
    assert [group[0]["version"] for report in reports for group in report["rollouts"]] == [4, 4]
    assert len(server.asked("/collective_rpc")) == 1
    assert len(server.asked("/inference/v1/generate")) == 2 * 3  # two probes of the vocabulary each


def test_a_request_names_tokens_limits_and_a_seed_of_its_own(server: PlayedServer, tmp_path: Path) -> None:
    [report] = play(server, tmp_path, [0, "generate", "generate", "next step", "greedy", "warm"])
    bodies = server.asked("/inference/v1/generate")[2:]  # two probes of the vocabulary
    first, again, later, greedy, warm = (body["sampling_params"] for body in bodies)
    assert bodies[0]["token_ids"] == PREFIX
    assert (first["n"], first["max_tokens"], first["logprobs"]) == (3, 6, 0)
    assert (first["temperature"], first["top_p"], first["top_k"], first["min_p"]) == (1.0, 1.0, 0, 0.0)
    assert first["stop_token_ids"] == [EOD] and first["ignore_eos"] is True and first["detokenize"] is False
    assert first["seed"] == again["seed"] != later["seed"]
    assert greedy["n"] == 1 and greedy["temperature"] == 0.0 and "seed" not in greedy
    assert (warm["temperature"], warm["top_p"], warm["top_k"]) == (0.7, 0.9, 20)
    sampled, _, _, copies, _ = report["rollouts"]
    assert [one["tokens"] for one in sampled] == [[10] * 6, [11] * 6, [12] * 6]  # in the order of their index
    assert [one["rollout"] for one in sampled] == [0, 1, 2]
    assert sampled[0]["log_probs"] == [-1.0] * 6
    assert [one["tokens"] for one in copies] == [[10] * 6] * 3


def test_every_m_steps_the_version_stays_that_of_the_servers(server: PlayedServer, tmp_path: Path) -> None:
    acts = [0, "generate", 1, "generate", 2, "generate", 3, "generate"]
    [report] = play(server, tmp_path, acts, rollout_sync_interval=3)
    assert [group[0]["version"] for group in report["rollouts"]] == [0, 0, 0, 3]


def test_a_restarted_server_gets_the_weights_again_and_is_asked_again(server: PlayedServer, tmp_path: Path) -> None:
    def restarted(body: Any) -> Any:
        server.version = "default"
        return {"choices": [choice(i, 6, "default") for i in range(3)]}

    # The first two questions are probes of the vocabulary.
    ordinary = [lambda body: server._generate(body)[1], 400]
    server.script["/inference/v1/generate"] = [*ordinary, restarted]
    [report] = play(server, tmp_path, [7, "generate"])
    assert [one["version"] for one in report["rollouts"][0]] == [7, 7, 7]
    assert len(server.asked("/collective_rpc")) == 2


def test_a_lone_request_outlives_its_attempts_while_the_server_is_restarted(
    server: PlayedServer, tmp_path: Path
) -> None:
    """One request opens no circuit breaker before its attempts are used up."""

    def back_with_other_weights(body: Any) -> Any:
        server.version = "default"
        return {"choices": []}

    ordinary = [lambda body: server._generate(body)[1], 400]
    server.script["/inference/v1/generate"] = [*ordinary, 500, 500, 500, back_with_other_weights]
    [report] = play(server, tmp_path, [7, "generate"], rollout_max_attempts=2)
    assert [one["version"] for one in report["rollouts"][0]] == [7, 7, 7]
    assert len(server.asked("/collective_rpc")) == 2  # the second after its restart


def test_weights_that_change_within_a_rollout_are_not_taken_for_one_version(
    server: PlayedServer, tmp_path: Path
) -> None:
    def mixed(body: Any) -> Any:
        spans = [{"version": server.version, "start": 0, "end": 2}, {"version": "8-other", "start": 2, "end": 6}]
        return {"choices": [choice(i, 6, "7", weight_versions=spans) for i in range(3)]}

    server.script["/inference/v1/generate"] = [lambda body: server._generate(body)[1], 400, mixed, mixed]
    with pytest.raises(RankFailure, match=r"answers with weights 8-other in place of 7-\w+, .*another run"):
        play(server, tmp_path, [7, "generate"])


def test_transient_failures_are_retried(server: PlayedServer, tmp_path: Path) -> None:
    aborted = {"choices": [choice(0, 2, "", finish_reason="abort")]}
    server.script["/inference/v1/generate"] = [
        lambda body: server._generate(body)[1], 400, 500, 503, lambda body: aborted
    ]  # fmt: skip
    [report] = play(server, tmp_path, [0, "generate"])
    assert len(report["rollouts"][0]) == 3
    assert len(server.asked("/inference/v1/generate")) == 6


@pytest.mark.parametrize(
    ("path", "answers", "message"),
    [
        ("/inference/v1/generate", [500] * 20, "no answer after all attempts: server: HTTP 500 EngineCore encountered"),
        ("/inference/v1/generate", [lambda s: {"choices": [choice(0, 3, s.version)] * 3}], "after 3 of 6 tokens"),
        ("/inference/v1/generate", [lambda s: {"choices": [choice(0, 6, s.version)] * 2}], "2 continuations for 3"),
        ("/inference/v1/generate", [lambda s: {"choices": [choice(60, 6, s.version)] * 3}], "sampled token 70 of 61"),
        ("/collective_rpc", [500], r"no rollout server could take version 0-\w+ .*/collective_rpc: server: HTTP 500"),
        ("/reset_prefix_cache", [lambda s: {"success": False}] * 20, "does not let go of its prefix cache"),
        ("/server_info", [404], "has no /server_info: start it as .* VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_failures_are_one_clear_line_on_every_rank(
    server: PlayedServer, tmp_path: Path, path: str, answers: list[Any], message: str
) -> None:
    probes: list[Any] = [lambda body: server._generate(body)[1], 400] if path == "/inference/v1/generate" else []
    server.script[path] = [
        *probes,
        *(one if isinstance(one, int) else lambda _, one=one: one(server) for one in answers),
    ]
    with pytest.raises(RankFailure, match=message) as raised:
        limits = {"rollout_max_attempts": 2, "rollout_sync_timeout_s": 2.9, "rollout_give_up_s": 1.0}
        play(server, tmp_path, [0, "generate"], **limits)
    assert "RolloutError" in str(raised.value)


def test_a_server_without_scale_out_forbids_what_is_needed_and_is_refused(server: PlayedServer, tmp_path: Path) -> None:
    server.script["/inference/v1/generate"] = [403]
    [report] = play(server, tmp_path, ["refused"])
    assert "has no /inference/v1/generate: start it as tools/export_policy.py" in report["problems"][0]


def test_servers_that_do_not_fit_are_refused_before_the_first_rollout(server: PlayedServer, tmp_path: Path) -> None:
    server.vocab = VOCAB + 3
    [report] = play(server, tmp_path, ["refused"])
    assert "has more tokens than the tokenizer's 61" in report["problems"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_config": {"logprobs_mode": "processed_logprobs", "model": "/nowhere"}},
            "start it with --logprobs-mode raw_logprobs",
        ),
        (
            {"device_config": {"device_type": "cpu"}, "scheduler_config": {"enable_chunked_prefill": True}},
            "--no-enable-chunked-prefill",
        ),
    ],
)
def test_a_server_with_other_settings_is_refused(
    server: PlayedServer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    server.info |= changes
    [report] = play(server, tmp_path, ["refused"])
    assert message in report["problems"][0]


def test_a_model_of_another_shape_is_named_before_weights_are_handed_over(server: PlayedServer, tmp_path: Path) -> None:
    served, weights = tmp_path / "served", tmp_path / "weights"
    for directory in (served, weights):
        directory.mkdir()
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=40,
        max_position_embeddings=96,
    )  # fmt: skip
    config = config_of(model.resolve(), VOCAB, torch.float32, None, EOD)
    (served / "config.json").write_text(json.dumps(config))
    server.info["model_config"]["model"] = str(served)
    [report] = play(server, weights, ["refused"])
    assert f"{server.url} serves a model whose ffn_hidden_size is 40 and not 48:" in report["problems"][0]
    assert not server.asked("/pause?mode=wait") and not server.asked("/collective_rpc")
    (served / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    play(server, weights, [0])
    assert server.version.startswith("0-")


def test_one_of_two_servers_that_is_not_there_is_left_behind_and_looked_at_when_it_comes(
    server: PlayedServer, tmp_path: Path
) -> None:
    late = PlayedServer()
    late.script["/v1/models"] = [503]  # not up yet when it is looked at first
    late.script["/weight_info"] = [503]
    payload = {"urls": [server.url, late.url], "folder": str(tmp_path), "options": {}, "sizes": {}}
    try:
        [report] = run_ranks(1, "tests.rollout.vllm_claims:play", payload | {"acts": [0, 1, "generate"]})
    finally:
        late.close()
    assert len(late.asked("/v1/models")) == 2 and late.version.startswith("1-") == server.version.startswith("1-")
    assert report["rollouts"][0][0]["version"] == 1


@pytest.mark.parametrize("transfer", ["files", "gloo"])
def test_a_server_that_is_left_half_updated_is_not_asked_until_it_is_back(
    server: PlayedServer, tmp_path: Path, transfer: str
) -> None:
    """It stays paused: each of its rollouts would wait for --rollout-request-timeout-s."""
    other = PlayedServer()

    def after_a_restart(_: Any) -> Any:
        other.version = "default"
        return {"weight_version": "default"}

    if transfer == "gloo":  # which leaves the old weights whole, so that the next transfer finds it well
        other.losses = 1
    else:
        other.script["/collective_rpc"] = [500]
        other.script["/weight_info"] = [lambda _: {"weight_version": "default"}, after_a_restart]
    for played in (server, other):
        played.info["weight_transfer_config"] = {"backend": "gloo"}
    options = {"rollout_weight_transfer": transfer}
    payload = {"urls": [other.url, server.url], "folder": str(tmp_path), "options": options, "sizes": {}}
    payload["acts"] = [0, "generate", "next step", "warm", 1, "generate", "next step"]
    try:
        [report] = run_ranks(1, "tests.rollout.vllm_claims:play", payload)
    finally:
        other.close()
    probes = 2  # of the vocabulary
    assert len(server.asked("/inference/v1/generate")) + len(other.asked("/inference/v1/generate")) == 2 * probes + 5
    assert len(server.asked("/inference/v1/generate")) == probes + 3 + 1
    assert [group[0]["version"] for group in report["rollouts"]] == [0, 0, 0, 1, 1]


def test_a_server_that_is_not_there_a_full_disk_and_a_long_prefix(server: PlayedServer, tmp_path: Path) -> None:
    server.longest = len(PREFIX) + 5
    with pytest.raises(RankFailure, match="more than the 8 of a rollout server: start it with --max-model-len 9"):
        play(server, tmp_path, [0, "generate"])
    (tmp_path / "file").touch()
    [report] = play(server, tmp_path / "file", ["refused"])
    assert "cannot be written to" in report["problems"][0] and "--rollout-weights-folder" in report["problems"][0]
    gone = PlayedServer()
    gone.close()
    [report] = play(gone, tmp_path, ["refused"])
    assert f"rollout server {gone.url}: transport:" in report["problems"][0]


def test_bodies_that_are_no_answer_are_failures() -> None:
    for body in (b"", b"[]", b'{"choices": []}', b'{"choices": [{"index": 0, "finish_reason": "stop"}]}'):
        assert isinstance(read_answer(body), Failure)


def test_options_that_cannot_work_are_refused() -> None:
    good = RolloutConfig(rollout_engine="vllm", rollout_endpoints=("http://host:8000",))
    good.validate()
    for changes, message in (
        ({"rollout_endpoints": ()}, "--rollout-endpoints is missing"),
        ({"rollout_endpoints": ("host:8000",)}, "give URLs like"),
        ({"rollout_endpoints": ("http://host:8000/v1",)}, "without /v1"),
        ({"rollout_sync_interval": 0}, "--rollout-sync-interval is 0"),
        ({"rollout_give_up_s": 0.0}, "--rollout-give-up-s is 0.0"),
        ({"rollout_importance_cap": -1.0}, "--rollout-importance-cap is -1.0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            replace(good, **changes).validate()


def test_seeds_of_rollouts_do_not_collide() -> None:
    seeds = np.array([vllm_claims.seed_of(sample, step) for sample in range(40) for step in range(5)])
    gaps = np.diff(np.sort(seeds))
    assert gaps.min() > 16  # vLLM numbers the n of a request from its seed
