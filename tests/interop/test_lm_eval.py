"""lm-evaluation-harness: ours against transformers' backend on local tasks; skipped where it is not installed.

Not covered: the paper's tasks themselves, whose data must be downloaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_sip.evaluation.lm_eval_tasks import PAPER_TASKS, TaskOptions, means, table
from megatron_sip.evaluation.scoring import plan_batches
from tests.interop.lm_eval_local import SCORES, flags_of, scores_by_transformers, write_tasks_and_model
from tests.ranks import run_ranks
from tools.run_lm_eval import main

LENGTH = 64  # shorter than the texts: these are cut into windows


def test_scores_equal_those_of_transformers_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'megatron-sip[lm-eval]'")
    write_tasks_and_model(tmp_path, LENGTH)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache/parent"))
    flags = flags_of(tmp_path, tmp_path / "ours.json")
    flags += ["--config", str(tmp_path / "megatron/recipe.yaml"), "--tensor-model-parallel-size", "2"]
    flags += ["--batch-tokens", "256"]
    payload = {"flags": flags, "cache": str(tmp_path / "cache")}
    reports = run_ranks(2, "tests.interop.lm_eval_claims:scores", payload, timeout_s=240)
    assert [report["status"] for report in reports] == [0, 0]
    ours, theirs = reports[0]["results"]["results"], scores_by_transformers(tmp_path, LENGTH)
    for task, metric in SCORES:
        assert ours[task][metric] == pytest.approx(theirs[task][metric], rel=1e-4), metric
    assert ours["local_generating"]["exact_match,none"] == 0.5
    # Of the model that was converted transformers' softmax has 6 rows more, which are no tokens.
    padded = scores_by_transformers(tmp_path, LENGTH, "model")["local_rolling"]
    assert padded["word_perplexity,none"] > 1.01 * ours["local_rolling"]["word_perplexity,none"]
    assert "local_choices" in reports[0]["printed"] and reports[1]["printed"] == ""


def test_without_the_harness_the_tool_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--config", "recipe.yaml"]) == 2
    assert "lm-evaluation-harness is not installed: pip install 'megatron-sip[lm-eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit is 0: give at least 1"),
        (["--num-fewshot", "-1"], "--num-fewshot is -1: give at least 0"),
        (["--include-path", "/nowhere"], "--include-path /nowhere is no folder"),
        (["--output", "/nowhere/x.json"], "--output /nowhere/x.json: there is no folder /nowhere"),
        (["--endpoint", "http://h:1"], "--served-model-name or --tokenizer is missing"),
        (["--config", "recipe.yaml"], "recipe.yaml"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_scored(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_server_is_asked_for_its_models_before_it_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.interop.models import tokenizer_folder
    from tests.rollout.played import PlayedServer

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    tokenizer_folder(tmp_path / "tokenizer")
    (tmp_path / "empty").mkdir()
    server = PlayedServer()
    server.script["/v1/models"] = [lambda _: {"data": [{"id": "policy", "max_model_len": 64}]}] * 3
    try:
        for name, tokenizer, more, message in (
            ("judge", "tokenizer", [], f"--endpoint {server.url} serves policy, not judge"),
            ("policy", "empty", [], f"--tokenizer {tmp_path / 'empty'} has none that transformers can load"),
            ("policy", "tokenizer", ["--max-length", "65"], "the server's longest sequence has 64 tokens"),
        ):
            flags = ["--endpoint", server.url, "--served-model-name", name, "--tokenizer", str(tmp_path / tokenizer)]
            assert main([*flags, *more]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and message in error
    finally:
        server.close()
    assert main(flags) == 2
    assert f"--endpoint {server.url} does not list its models" in capsys.readouterr().err


def test_the_mean_is_plain_and_takes_accuracy_where_a_task_has_no_other() -> None:
    assert list(PAPER_TASKS) == [
        "boolq", "piqa", "social_iqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "mmlu"
    ]  # fmt: skip
    results = {"boolq": {"acc,none": 0.5}, "piqa": {"acc,none": 0.6, "acc_norm,none": 0.9}}
    assert means(results, "acc") == pytest.approx(0.55)
    assert means(results, "acc_norm") == pytest.approx(0.7)
    assert means({"rolling": {"word_perplexity,none": 4.0}}, "acc") is None
    assert table(results).splitlines()[-1].split() == ["mean", "0.5500", "0.7000"]


def test_examples_are_the_tasks_own_but_for_mmlu_or_as_asked() -> None:
    assert TaskOptions().num_examples["mmlu"] == 5 and TaskOptions().num_examples["boolq"] == 0
    assert TaskOptions("mine,piqa").num_examples == {"mine": None, "piqa": None}
    assert TaskOptions("mine", num_fewshot=2).num_examples == {"mine": 2}


def test_batches_are_by_length_and_bounded_with_their_padding() -> None:
    batches = plan_batches([3, 9, 4, 10, 30, 2], batch_tokens=20)
    assert batches == [[4], [3, 1], [2, 0, 5]]
