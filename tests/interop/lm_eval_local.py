"""Local tasks for lm-evaluation-harness, a model, and its scores by transformers' backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sip.checkpoint.huggingface import to_hugging_face, to_megatron
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
dataset_kwargs: {{data_files: {{test: {folder}/prompts.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: [{stop}], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = ("local_choices", "local_rolling", "local_generating")
SCORES = (
    ("local_choices", "acc,none"),
    ("local_choices", "acc_norm,none"),
    ("local_rolling", "word_perplexity,none"),
    ("local_rolling", "byte_perplexity,none"),
    ("local_generating", "exact_match,none"),
)
_WORDS = ("copy", "number", "place", "means", "convert", "every")


def write_tasks_and_model(folder: Path, max_length: int) -> None:
    """Task files, ``model`` of transformers, ``megatron``, and ``policy``: what is exported from that.

    ``model`` has 6 rows that no token has, ``policy`` has none. The longest text has about 100 tokens.
    """
    questions = [
        {
            "question": f"What comes after {word}?",
            "choices": [f"the {word}", "it is to", f"same {number} (x, y)"],
            "label": number % 3,
        }
        for number, word in enumerate(_WORDS * 3)
    ]
    texts = [{"text": " ".join((*_WORDS[number:], *_WORDS) * (1 + number // 2)) + "."} for number in range(len(_WORDS))]
    save_model(
        folder / "model", "llama31", hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        max_position_embeddings=max_length, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    to_megatron(folder / "model", folder / "megatron")
    to_hugging_face(folder / "megatron", folder / "policy", vocab_rows=0)
    prompts, stop = _prompts(folder / "policy", [text["text"][:20] for text in texts])
    for name, lines in (("choices", questions), ("texts", texts), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("choices", _CHOICES), ("rolling", _ROLLING), ("generating", _GENERATING)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder, stop=json.dumps(stop)))


def _prompts(model: Path, starts: list[str]) -> tuple[list[dict[str, str]], str]:
    """Prompts with what greedy decoding gives for the first half of them, and something else for the others.

    Also a stop string that ends the first answer within the 8 tokens of the task.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    answers = []
    for start in starts:
        prompt = tokenizer(start).input_ids
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():  # one row, no cache, no padding
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    # A server's text leaves out a character that is not whole by the last token, for which others write U+FFFD: the
    # answers to be met end with whole ones.
    order = sorted(range(len(starts)), key=lambda number: answers[number].endswith("\ufffd"))
    starts, answers = [starts[number] for number in order], [answers[number] for number in order]
    assert not answers[len(starts) // 2 - 1].endswith("\ufffd"), answers
    stop = answers[0][-2:]
    assert answers[0].find(stop) > 0, answers
    right = [answer.partition(stop)[0] for answer in answers]
    wrong = [answer + "?" if number >= len(starts) // 2 else answer for number, answer in enumerate(right)]
    return [{"prompt": start, "target": target} for start, target in zip(starts, wrong, strict=True)], stop


def flags_of(folder: Path, output: Path) -> list[str]:
    """Of tools/run_lm_eval.py, without the policy."""
    return ["--tasks", ",".join(TASKS), "--include-path", str(folder), "--output", str(output)]


def scores_by_transformers(folder: Path, max_length: int, model: str = "policy") -> dict[str, Any]:
    """What the harness's own backend ``hf`` measures."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(folder / model), "dtype": "float32", "device": "cpu", "max_length": max_length,
        },
        tasks=list(TASKS),
        batch_size=4,
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=False,
    )  # fmt: skip
    results: dict[str, Any] = found["results"]
    return results
