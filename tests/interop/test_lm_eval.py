"""lm-evaluation-harness: ours against transformers' backend on local tasks; skipped where it is not installed.

Not covered: the paper's tasks themselves, whose data must be downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.checkpoint.huggingface import to_megatron
from megatron_sip.evaluation.lm_eval_tasks import PAPER_TASKS, means, table
from megatron_sip.evaluation.scoring import plan_batches
from tests.interop.models import save_model
from tests.ranks import run_ranks

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
GENERATING = """
task: local_generating
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text[:20]}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: bleu}}]
"""
NAMES = ("local_choices", "local_rolling")
WORDS = ("copy", "number", "place", "means", "convert", "every")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local task files, and a model with its conversion."""
    folder = tmp_path_factory.mktemp("harness")
    questions = [
        {
            "question": f"What comes after {word}?",
            "choices": [f"the {word}", "it is to", f"same {number} (x, y)"],
            "label": number % 3,
        }
        for number, word in enumerate(WORDS * 3)
    ]
    texts = [{"text": " ".join((*WORDS[number:], *WORDS) * (1 + number)) + "."} for number in range(len(WORDS))]
    for name, lines in (("choices", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("choices", CHOICES), ("rolling", ROLLING), ("generating", GENERATING)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    save_model(folder / "model", "llama31")
    to_megatron(folder / "model", folder / "megatron")
    return folder


def test_scores_equal_those_of_transformers_backend(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache/parent"))
    from lm_eval.tasks import TaskManager

    names = (*NAMES, "local_generating")
    flags = ["--tasks", ",".join(names), "--include-path", str(tasks), "--output", str(tasks / "ours.json")]
    flags += ["--config", str(tasks / "megatron/recipe.yaml"), "--tensor-model-parallel-size", "2"]
    flags += ["--batch-tokens", "256", "--seq-length", "48", "--suffix-length", "16"]
    payload = {"flags": flags, "cache": str(tasks / "cache")}
    reports = run_ranks(2, "tests.interop.lm_eval_claims:scores", payload, timeout_s=240)
    assert [report["status"] for report in reports] == [0, 0]
    ours = reports[0]["results"]["results"]
    theirs: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tasks / "model"), "dtype": "float32", "device": "cpu", "max_length": 64},
        tasks=list(names),
        batch_size=4,
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=False,
    )["results"]
    for name, metric in (
        ("local_choices", "acc"),
        ("local_choices", "acc_norm"),
        ("local_rolling", "word_perplexity"),
        ("local_rolling", "byte_perplexity"),
        ("local_generating", "bleu"),
    ):
        assert ours[name][f"{metric},none"] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-4), metric
    assert "local_choices" in reports[0]["printed"] and reports[1]["printed"] == ""


def test_without_the_harness_the_tool_says_what_to_install(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    from tools.run_lm_eval import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--config", str(tasks / "megatron/recipe.yaml")]) == 2
    assert capsys.readouterr().err == "error: lm-evaluation-harness is not installed: pip install lm_eval\n"


def test_the_mean_is_plain_and_takes_accuracy_where_a_task_has_no_other() -> None:
    assert list(PAPER_TASKS) == [
        "boolq", "piqa", "social_iqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "mmlu"
    ]  # fmt: skip
    results = {"boolq": {"acc,none": 0.5}, "piqa": {"acc,none": 0.6, "acc_norm,none": 0.9}}
    assert means(results, "acc") == pytest.approx(0.55)
    assert means(results, "acc_norm") == pytest.approx(0.7)
    assert means({"rolling": {"word_perplexity,none": 4.0}}, "acc") is None
    assert table(results).splitlines()[-1].split() == ["mean", "0.5500", "0.7000"]


def test_batches_are_by_length_and_bounded_with_their_padding() -> None:
    batches = plan_batches([3, 9, 4, 10, 30, 2], batch_tokens=20)
    assert batches == [[4], [3, 1], [2, 0, 5]]
