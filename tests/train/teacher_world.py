"""Examples, prompts and a tiny model for tests of the teacher's training; what the ranks run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.teacher.ngram import fit_ngrams
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.tokenizer.training import train_sentencepiece
from tests.train.runs import records

PROMPTS = {
    "quality": "Q{{prefix}} ;{{option_1}} ;{{option_2}} :",
    "safety": "S{{text}} :",
    "rewriter": "R{{prefix}} ;{{suffix}} =",
}
VERDICTS = " Conclusion: Option 1 Conclusion: Option 2 FINAL DECISION: YES FINAL DECISION: NO"


def write_world(folder: Path) -> None:
    """A tokenizer of a few words, an n-gram judge, prompts, and 24 examples of each kind."""
    words = ["ka", "lo", "mi", "nu", "po", "zux"]
    text = [" " + " ".join(words[(i + j) % 6] for j in range(8)) for i in range(6)] + [VERDICTS, "Q ; S : R = "]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text * 30))
    train_sentencepiece([folder / "text.jsonl"], folder / "world.model", 340, num_threads=1)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(folder / "world.model")))
    encoded = [[*tokenizer.encode(line), tokenizer.eod_id] for line in text]
    lengths = np.array([len(ids) for ids in encoded])
    model = fit_ngrams(np.concatenate(encoded), lengths, tokenizer.vocab_size, 3, tokenizer.fingerprint)
    model.save(folder / "judge.npz")
    (folder / "prompts").mkdir()
    for name, prompt in PROMPTS.items():
        (folder / "prompts" / f"{name}.txt").write_text(prompt)
    (folder / "unsafe.txt").write_text("zux\n")
    for name, numbers in (("", range(24)), (".valid", range(24, 30))):
        for task, records_of in examples(words, numbers).items():
            text = "".join(json.dumps(record) + "\n" for record in records_of)
            (folder / f"{task}{name}.jsonl").write_text(text)


def examples(words: Sequence[str], numbers: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Of a judge and of a rewriter, by task; pairs and rewrites of numbers up to 30 are each their own."""
    lines: dict[str, list[dict[str, Any]]] = {"judge": [], "rewriter": []}
    for number in numbers:
        prefix, good = f" {words[number % 5]} {words[number % 3]}", f" {words[number % 4]} {words[number % 5]}"
        bad, unsafe = " po po", number % 2 == 1
        label = 1 + number % 2
        options = [good, bad] if label == 1 else [bad, good]
        lines["judge"].append({"task": "quality", "prefix": prefix, "options": options, "label": label})
        suffix, said = (" zux ka", "unsafe") if unsafe else (good, "safe")
        lines["judge"].append({"task": "safety", "text": suffix, "label": said})
        lines["rewriter"].append({"task": "rewrite", "prefix": prefix, "suffix": suffix, "label": said})
    return lines


def recipe(folder: Path, task: str, **changes: Any) -> dict[str, Any]:
    """A short training of the ``task``; ``changes`` are flat keys."""
    return {
        "train_data": [str(folder / f"{task}.jsonl")],
        "valid_data": [str(folder / f"{task}.valid.jsonl")],
        "train_iters": 4,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "generations": 4,
        "eval_interval": 2,
        "eval_samples": 8,
        "prompt_length": 40,
        "rollout_max_new_tokens": 6,
        "seed": 5,
        "preset": "tiny",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": 4,
        "lr": 3e-3,
        "lr_decay_style": "constant",
        "tokenizer_model": str(folder / "world.model"),
        "judge_prompts": str(folder / "prompts"),
        "safety_words": str(folder / "unsafe.txt"),
        "run_dir": str(folder / "run"),
        "save": None,
        "load": None,
        **changes,
    }


def rewarded(task: Any) -> Callable[..., Any]:
    """Random weights never give a verdict: a stand-in reward with spread, a function of the tokens alone."""
    import dataclasses

    import numpy as np

    score = task.score

    def scored(examples: Any, rollouts: Any, learn: bool = True) -> Any:
        return [
            dataclasses.replace(one, rewards=np.array([float(sum(c.tokens) % 3) / 2 for c in answers]))
            for one, answers in zip(score(examples, rollouts, learn), rollouts, strict=True)
        ]

    return scored


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Runs a recipe on this rank. Returns step records and weights."""
    from megatron_sip.checkpoint import StopSignals
    from megatron_sip.config import from_mapping
    from megatron_sip.distributed import initialize
    from megatron_sip.train.grpo.build import build_grpo_trainer
    from megatron_sip.train.grpo.config import GRPORunConfig

    config = from_mapping(GRPORunConfig, payload["recipe"])
    context = initialize(config.parallel, config.task.seed)
    with StopSignals() as signals, build_grpo_trainer(config, payload["task"], context, signals) as trainer:
        if payload.get("rewarded", True):
            task = trainer._runner._task
            task.score = rewarded(task)  # type: ignore[method-assign]
        trainer.load()
        end = trainer.run()
        weights = {
            name: parameter.detach().float().numpy().copy()
            for chunk in trainer._engine.chunks
            for name, parameter in chunk.named_parameters()
        }
    return {"end": end.step, "weights": weights, "records": records(config)}
