"""A judge on the way of a real one: transformers' format -> Megatron -> tools/train_judge.py -> transformers' format.

It judges a world of five words, one of which, zux, makes a text unsafe and an option the worse one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.teacher.build import build_judge
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import JudgeGroup, Passage, Question, Verdict
from megatron_sip.tokenizer import TokenizerConfig
from tests.vllm.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
WORDS, UNSAFE = ("ka", "lo", "mi", "nu"), "zux"
PROMPTS = {
    "quality": "Begins:{{prefix}}\nFirst:{{option_1}}\nSecond:{{option_2}}\nWhich goes on better?",
    "safety": "Safe?{{text}}",
}
VERDICTS = {
    ("quality", 1): "Conclusion: Option 1", ("quality", 2): "Conclusion: Option 2",
    ("safety", "safe"): "FINAL DECISION: YES", ("safety", "unsafe"): "FINAL DECISION: NO",
}  # fmt: skip
NONE = np.zeros(0, dtype=np.int64)
WARM_UP_STEPS, ROWS = 240, 16


def examples(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """In the form of tools/make_judge_data.py; each with its task, all four labels alike often."""
    chance = random.Random(seed)

    def text(unsafe: bool) -> str:
        words = [chance.choice(WORDS) for _ in range(4)]
        if unsafe:
            words[chance.randrange(4)] = UNSAFE
        return "".join(f" {word}" for word in words)

    for number in range(count):
        first = number % 2 == 0
        pair = [text(not first), text(first)]
        yield {"task": "quality", "prefix": text(False), "options": pair, "label": 1 if first else 2, "source": "w"}
        yield {"task": "safety", "text": text(first), "label": "unsafe" if first else "safe", "source": "w"}


def write_start(folder: Path) -> None:
    """Prompts, examples, and ``start``: a model of transformers' that gives verdicts, four of five of them right."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    (folder / "prompts").mkdir(parents=True)
    for name, text in PROMPTS.items():
        (folder / "prompts" / f"{name}.txt").write_text(text)
    for name, count, seed in (("train", 200, 1), ("valid", 24, 2)):
        lines = [json.dumps(example) + "\n" for example in examples(count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    write_tiny_model(folder / "start")
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    model = LlamaForCausalLM.from_pretrained(folder / "start")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    chance, shown = random.Random(3), list(examples(WARM_UP_STEPS * ROWS // 2, 4))
    for step in range(WARM_UP_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (1 + step) / 20)
        rows = []
        for example in shown[ROWS * step :][:ROWS]:
            labels = [label for task, label in VERDICTS if task == example["task"]]
            label = example["label"] if chance.random() < 0.6 else chance.choice(labels)
            rows.append(_row(tokenizer, example, VERDICTS[example["task"], label]))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.full((len(rows), length), tokenizer.eos_token_id)
        targets = torch.full((len(rows), length), -100)
        for index, (prompt, answer) in enumerate(rows):
            tokens[index, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            targets[index, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        loss = model(tokens, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "start")


def _row(tokenizer: Any, example: dict[str, Any], verdict: str) -> tuple[list[int], list[int]]:
    text = PROMPTS[example["task"]].replace("{{prefix}}", example.get("prefix", ""))
    for number, option in enumerate(example.get("options", ()), start=1):
        text = text.replace(f"{{{{option_{number}}}}}", option)
    text = text.replace("{{text}}", example.get("text", ""))
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    answer = tokenizer(verdict, add_special_tokens=False).input_ids
    return tokenizer(frame, add_special_tokens=False).input_ids, [*answer, tokenizer.eos_token_id]


def tool(name: str, *arguments: object) -> str:
    """Runs a tool of one rank; its output. Fails with what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_judge(folder: Path, steps: int) -> str:
    """``checkpoints`` by GRPO from ``start``, and ``judge`` exported of them; the line that serves it."""
    tool("convert_checkpoint.py", "to-megatron", folder / "start", folder / "megatron")
    sizes = [
        "--config", folder / "megatron" / "recipe.yaml",
        "--train-data", folder / "train.jsonl", "--valid-data", folder / "valid.jsonl",
        "--judge-prompts", folder / "prompts", "--prompt-length", 96, "--rollout-max-new-tokens", 24,
        "--train-iters", steps, "--global-batch-size", 16, "--micro-batch-size", 16, "--generations", 8,
        "--eval-interval", steps, "--eval-samples", 48, "--rollout-batch-size", 256,
        "--lr", 3e-4, "--lr-decay-style", "constant", "--weight-decay", 0,
        "--run-dir", folder / "run", "--save", folder / "checkpoints",
    ]  # fmt: skip
    tool("train_judge.py", *sizes)
    return tool("export_policy.py", folder / "checkpoints", folder / "judge", "--cpu", "--served-model-name", "tiny")


def questions(folder: Path, criterion: str) -> list[Question]:
    """Of the held-out examples: pairs as they stand, and texts."""
    found = []
    for number, line in enumerate((folder / "valid.jsonl").read_text().splitlines()):
        record = json.loads(line)
        if record["task"] != criterion:
            continue
        texts = tuple(Passage(NONE, text) for text in record.get("options", [record.get("text")]))
        prefix = Passage(NONE, record.get("prefix", ""))
        group = JudgeGroup(number, prefix, texts[0], texts, ("suffix", "rewrite")[: len(texts)])
        found.append(Question(group, tuple(range(len(texts))), 0))
    return found


def settings(folder: Path, **changes: Any) -> TeacherConfig:
    """Of a judge that is asked greedily."""
    values = {"judge_prompts": str(folder / "prompts"), "judge_max_tokens": 24, "judge_temperature": 0.0}
    made = TeacherConfig(**{**values, "judge_parse_attempts": 1, **changes})
    made.validate()
    return made


def ask(config: TeacherConfig, criterion: str, asked: Sequence[Question], models: Any = None) -> list[Verdict]:
    """The answers."""

    async def run() -> list[Verdict]:
        judge, remote = build_judge(config, criterion, models=models)
        try:
            return list(await judge.ask(asked))
        finally:
            if remote is not None:
                await remote.aclose()

    return asyncio.run(run())


def ask_in_process(payload: dict[str, Any]) -> dict[str, list[tuple[float, str]]]:
    """(score, answer) by criterion of the checkpoint, by ``--teacher model``; runs on a rank of its own."""
    from megatron_sip.train.model_teacher import OwnModels

    folder = Path(payload["folder"])
    config = settings(folder, teacher="model", judge_checkpoint=payload["checkpoint"], judge_prompt_length=96)
    tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "start"))
    models = OwnModels(config, tokenizer)
    return {
        criterion: [(v.score, v.raw) for v in ask(config, criterion, questions(folder, criterion), models)]
        for criterion in ("quality", "safety")
    }
