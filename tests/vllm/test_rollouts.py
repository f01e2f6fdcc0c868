"""Rollouts and weights through a real vLLM server on CPU, beside those of the training ranks.

Not covered: vLLM on GPUs, its own tensor parallelism, several servers.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sip.checkpoint.huggingface import to_megatron
from tests.interop.models import save_model
from tests.ranks import RankFailure, run_ranks
from tests.vllm.rollout_claims import NEW_TOKENS
from tests.vllm.server import VllmServer, free_port, printed_server
from tools.export_policy import main as export

EOD = 2
SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
"""vLLM on CPU has no heads narrower than 32."""


@pytest.fixture(scope="module", params=["llama31", "qwen3"])
def served(request: pytest.FixtureRequest, vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(converted model, server by the line that tools/export_policy.py printed of it), one tied before, one not."""
    root = tmp_path_factory.mktemp("rollouts")
    sizes = SIZES | {"head_dim": 32} if request.param == "qwen3" else SIZES
    save_model(root / "model", request.param, **sizes)
    to_megatron(root / "model", root / "megatron")
    port, printed = free_port(), io.StringIO()
    flags = ["--for-rollouts", "--cpu", "--weight-transfer", "gloo", "--port", str(port)]
    with redirect_stdout(printed):
        assert export([str(root / "megatron"), str(root / "policy"), *flags]) == 0
    with printed_server(printed.getvalue(), vllm_python, root / "policy", port, root / "server.log") as server:
        yield root / "megatron", server


def roll_out(served: tuple[Path, VllmServer], folder: Path, tp: int, pp: int, **changes: Any) -> list[dict[str, Any]]:
    root, server = served
    payload = {
        "sizes": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        "root": str(root), "url": server.root, "folder": str(folder), "interval": 1, "versions": [5, 6], "eod": EOD,
        "transfer": "files",
        **changes,
    }  # fmt: skip
    return run_ranks(tp * pp, "tests.vllm.rollout_claims:roll_out", payload, timeout_s=200)


@pytest.fixture(
    scope="module",
    params=[(1, 1, "files"), (2, 2, "files"), (1, 1, "gloo"), (2, 2, "gloo")],
    ids=["one rank, files", "tp 2, pp 2, files", "one rank, gloo", "tp 2, pp 2, gloo"],
)
def ranks(
    request: pytest.FixtureRequest, served: tuple[Path, VllmServer], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    tp, pp, transfer = request.param
    return roll_out(served, tmp_path_factory.mktemp("weights"), tp, pp, transfer=transfer)


def test_greedy_tokens_equal_ours_before_and_after_a_change_of_the_weights(ranks: list[dict[str, Any]]) -> None:
    report = ranks[0]
    for version in (5, 6):
        for theirs, ours in zip(report[f"greedy {version}"], report[f"ours {version}"], strict=True):
            for their, our in zip(theirs, ours, strict=True):
                assert their[0] == our[0] and their[2:] == our[2:]
                np.testing.assert_allclose(their[1], our[1], atol=5e-5)
    print("seconds of a transfer:", report["sync_s 5"], report["sync_s 6"])
    before, after = ([group[0][0] for group in report[f"greedy {version}"]] for version in (5, 6))
    assert all(first != second for first, second in zip(before, after, strict=True)), "the weights must differ"


def test_a_rollout_follows_its_seed_and_not_its_batch(ranks: list[dict[str, Any]]) -> None:
    report = ranks[0]
    assert [[one[0] for one in group] for group in report["sampled 5"]] == [
        [one[0] for one in group] for group in report["again 5"][::-1]
    ]
    for group in report["sampled 5"]:
        assert len({tuple(one[0]) for one in group}) == 3
    for now, later in zip(report["sampled 5"], report["next step 5"], strict=True):
        assert [one[0] for one in now] != [one[0] for one in later]


def test_rollouts_end_with_eod_or_at_their_limit_and_carry_number_and_version(ranks: list[dict[str, Any]]) -> None:
    for version in (5, 6):
        for name in ("sampled", "warm", "next step", "greedy"):
            for group in ranks[0][f"{name} {version}"]:
                for number, (tokens, log_probs, rollout, tagged) in enumerate(group):
                    assert EOD not in tokens[:-1] and (len(tokens) == NEW_TOKENS or tokens[-1] == EOD)
                    assert len(log_probs) == len(tokens) and (rollout, tagged) == (number, version)
        assert ranks[0][f"nothing {version}"] == [[]]


def test_all_ranks_hear_the_same(ranks: list[dict[str, Any]]) -> None:
    reports = [{name: value for name, value in one.items() if name != "left" and "sync_s" not in name} for one in ranks]
    assert all(report == reports[0] for report in reports[1:])
    assert ranks[0]["left"] == [], "files of weights must not outlive the engine"


def test_every_second_step_the_old_weights_answer_and_say_so(served: tuple[Path, VllmServer], tmp_path: Path) -> None:
    [report] = roll_out(served, tmp_path, 1, 1, interval=2, versions=[0, 1, 2])
    versions = [report[f"greedy {step}"][0][0][3] for step in range(3)]
    assert versions == [0, 0, 2]
    tokens = [[group[0][0] for group in report[f"greedy {step}"]] for step in range(3)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert tokens[1] != [group[0][0] for group in report["ours 1"]]


def test_a_server_without_token_ids_in_and_out_is_refused(
    served: tuple[Path, VllmServer], vllm: VllmServer, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match=r"has no /inference/v1/generate: start it as tools/export_policy.py"):
        roll_out((served[0], vllm), tmp_path, 1, 1)
