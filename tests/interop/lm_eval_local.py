"""Local tasks for lm-evaluation-harness, a model, and its scores by transformers' backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sip.checkpoint.huggingface import to_megatron
from tests.interop.models import save_model

_CHOICES = """
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
_ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
_GENERATING = """
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
TASKS = ("local_choices", "local_rolling", "local_generating")
SCORES = (
    ("local_choices", "acc,none"),
    ("local_choices", "acc_norm,none"),
    ("local_rolling", "word_perplexity,none"),
    ("local_rolling", "byte_perplexity,none"),
    ("local_generating", "bleu,none"),
)
_WORDS = ("copy", "number", "place", "means", "convert", "every")


def write_tasks_and_model(folder: Path, max_length: int) -> None:
    """Task files, ``model`` of transformers, ``megatron``. The longest text has about 100 tokens."""
    questions = [
        {
            "question": f"What comes after {word}?",
            "choices": [f"the {word}", "it is to", f"same {number} (x, y)"],
            "label": number % 3,
        }
        for number, word in enumerate(_WORDS * 3)
    ]
    texts = [{"text": " ".join((*_WORDS[number:], *_WORDS) * (1 + number // 2)) + "."} for number in range(len(_WORDS))]
    for name, lines in (("choices", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("choices", _CHOICES), ("rolling", _ROLLING), ("generating", _GENERATING)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    save_model(
        folder / "model", "llama31", hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        max_position_embeddings=max_length, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    to_megatron(folder / "model", folder / "megatron")


def flags_of(folder: Path, output: Path) -> list[str]:
    """Of tools/run_lm_eval.py, without the policy."""
    return ["--tasks", ",".join(TASKS), "--include-path", str(folder), "--output", str(output)]


def scores_by_transformers(folder: Path, max_length: int) -> dict[str, Any]:
    """What the harness's own backend ``hf`` measures."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(folder / "model"), "dtype": "float32", "device": "cpu", "max_length": max_length,
        },
        tasks=list(TASKS),
        batch_size=4,
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=False,
    )  # fmt: skip
    results: dict[str, Any] = found["results"]
    return results
