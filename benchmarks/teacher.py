#!/usr/bin/env python
"""Trains a judge and a rewriter by GRPO, then policies by that judge and by a coin, in a language of 32 words.

    benchmarks/teacher.py rewriter --seed 1; benchmarks/teacher.py policy --seed 1; benchmarks/teacher.py table

Every stage runs the tools that a user runs, one rank, one core, and first the stages that it needs. A stage that was
stopped goes on where it was; one that has finished does nothing. Results: docs/results/teacher.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.teacher_world import UNSAFE_WORDS, documents, verdict_lines, warm_up_texts, write_lines, write_templates
from megatron_sip.tokenizer.training import train_sentencepiece

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE, SUFFIX, PREFIX = 380, 16, 8
NOISE = 0.2
"""Of the copies that the warm-up shows the rewriter."""
DOCUMENTS = {"policy": 6000, "warm": 24000, "teacher": 48000, "ngram": 6000, "test": 2000}
EXAMPLES = {"warm": (8000, 2000, 4000, 256), "teacher": (16000, 4000, 8000, 512)}
"""Quality, safety, rewrite examples for training, and of each for validation."""
MODEL = {
    "num_layers": 3,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "ffn_hidden_size": 256,
    "max_position_embeddings": 256,
    "make_vocab_size_divisible_by": 4,
    "init_method_std": 0.05,
}
POLICY = {
    "": {"lr": 3e-4, "curriculum": "ntp=0.5,rollout=0.5:100"},
    "-strong": {"lr": 1e-3, "curriculum": "ntp=0.25,rollout=0.75:100"},
}
"""How hard the policies are trained on their judge's verdicts."""
COMPARISONS = {
    "": [],
    "-cut": ["--cut-to-shorter"],
    "-cut-plain": ["--cut-to-shorter", "--quality-judge", "plain"],
}
"""How two policies are compared: by ``robust`` as they end, at equal lengths, and so by the plain log-probability."""
GRPO = {"lr": 3e-4, "lr_decay_style": "constant", "weight_decay": 0, "prompt_length": 80, "rollout_batch_size": 512}


def run(tool: str, *arguments: str | Path, **options: Any) -> None:
    """Runs a tool; ends this program if it fails. An option's underscores become dashes; a list gives several words."""
    words = [str(word) for word in arguments]
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    print("$", tool, " ".join(words), flush=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    status = subprocess.run([sys.executable, ROOT / tool, *words], cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def train(arm: Path, tool: str, **options: Any) -> Path:
    """A training run under ``arm``, resumed if it was stopped, skipped if it has finished; returns its checkpoints."""
    saved = arm / "checkpoints"
    if not (arm / "finished.json").exists():
        folders = {"save": saved, "load": saved, "run_dir": arm, "tensorboard_dir": arm / "tensorboard"}
        rhythm = {"save_interval": 50, "keep_last": 1, "log_interval": 20, "adam_beta2": 0.95}
        run(tool, "--no-untie-embeddings-and-output-weights", **MODEL, **folders, **rhythm, **options)
    return saved


class Bench:
    """Stages by name; ``folder`` holds everything."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.arms = folder / f"seed{seed}"
        self.seed = seed
        self.tokenizer = {
            "tokenizer_type": "SentencePieceTokenizer",
            "tokenizer_model": self.data / "world.model",
        }

    def make_data(self) -> None:
        """Documents, tokenizer, examples, warm-up texts, tokenized corpora, the n-gram judge."""
        data = self.data
        if (data / "judge.npz").exists():
            return
        write_templates(data / "prompts")
        write_templates(data / "prompts-no-prefix", "{{prefix}}")
        (data / "unsafe.txt").write_text("\n".join(word.strip() for word in UNSAFE_WORDS) + "\n", encoding="utf-8")
        for number, (name, count) in enumerate(DOCUMENTS.items()):
            write_lines(data / f"{name}.jsonl", documents(count, number))
        write_lines(data / "vocabulary.jsonl", [*documents(2000, 9), *verdict_lines()])
        train_sentencepiece([data / "vocabulary.jsonl"], data / "world.model", VOCAB_SIZE, num_threads=1)
        for name, counts in EXAMPLES.items():
            self._make_examples(name, *counts)
        write_lines(data / "prompts.jsonl", warm_up_texts(data / "warm", NOISE, 1))
        for name in ("policy", "prompts", "ngram", "test"):
            files = {"input": data / f"{name}.jsonl", "output_prefix": data / name}
            run("tools/preprocess_data.py", "--append-eod", **files, workers=1, **self.tokenizer)
        run("tools/fit_judge.py", data_path=data / "ngram_text_document", output=data / "judge.npz", order=3)

    def _make_examples(self, name: str, quality: int, safety: int, rewrite: int, valid: int) -> None:
        run(
            "tools/make_judge_data.py",
            input=self.data / f"{name}.jsonl",
            output=self.data / name,
            quality_train=quality,
            safety_train=safety,
            rewrite_train=rewrite,
            **{f"{kind}_valid": valid for kind in ("quality", "safety", "rewrite")},
            corruption_kinds="replace",
            corruption_share=0.5,
            safety_words=self.data / "unsafe.txt",
            example_suffix_length=SUFFIX,
            example_prefix_length=PREFIX,
            example_min_prefix_length=PREFIX,
            **self.tokenizer,
        )

    def warm_up(self) -> Path:
        """The language, and the form of answers: next-token training on documents and prompts with idle answers."""
        return train(
            self.arms / "warm",
            "pretrain_sip.py",
            **self.tokenizer,
            data_path=[1, self.data / "policy_text_document", 2, self.data / "prompts_text_document"],
            curriculum="ntp:700",
            train_iters=700,
            eval_interval=0,
            seed=self.seed,
            seq_length=120,
            suffix_length=SUFFIX,
            min_prefix_length=PREFIX,
            micro_batch_size=16,
            global_batch_size=16,
            lr=2e-3,
            min_lr=2e-4,
            lr_decay_style="cosine",
            lr_warmup_iters=20,
            weight_decay=0.1,
        )

    def judge(self) -> Path:
        """GRPO on quality and safety."""
        examples = self.data / "teacher"
        return train(
            self.arms / "judge",
            "tools/train_judge.py",
            **self.tokenizer,
            **GRPO,
            pretrained_checkpoint=self.warm_up(),
            judge_prompts=self.data / "prompts",
            seed=self.seed,
            train_data=[3, examples / "quality.train.jsonl", 1, examples / "safety.train.jsonl"],
            valid_data=[1, examples / "quality.valid.jsonl", 1, examples / "safety.valid.jsonl"],
            train_iters=160,
            eval_interval=20,
            eval_samples=512,
            global_batch_size=32,
            micro_batch_size=32,
            generations=16,
            rollout_max_new_tokens=10,
        )

    def rewriter(self) -> Path:
        """GRPO on eq. 1 and eq. 2, whose judge is the one that was just trained."""
        examples = self.data / "teacher"
        return train(
            self.arms / "rewriter",
            "tools/train_rewriter.py",
            **self.tokenizer,
            **GRPO,
            **self.teacher(self.judge()),
            pretrained_checkpoint=self.warm_up(),
            seed=self.seed,
            train_data=examples / "rewrite.train.jsonl",
            valid_data=examples / "rewrite.valid.jsonl",
            train_iters=200,
            eval_interval=20,
            eval_samples=256,
            global_batch_size=16,
            micro_batch_size=16,
            generations=16,
            rollout_max_new_tokens=SUFFIX,
        )

    def policy(self, strength: str = "") -> None:
        """Two policies from one start: judged by the trained judge, and by what it was before: a coin."""
        start = self._policy_warm_up()
        arms = {"by-judge": self.judge(), "by-coin": self.warm_up()}
        saved = {name: self._policy(name + strength, start, judge, strength) for name, judge in arms.items()}
        saved["start"] = start
        for baseline in ("by-coin", "start"):
            for name, flags in COMPARISONS.items():
                output = self.arms / f"against-{baseline}{strength}{name}.json"
                if not output.exists():
                    self._compare(saved["by-judge"], saved[baseline], output, flags)

    def _compare(self, checkpoint: Path, baseline: Path, output: Path, more: list[str]) -> None:
        run(
            "tools/evaluate.py",
            "--no-untie-embeddings-and-output-weights",
            *more,
            **MODEL,
            **self._policy_data(),
            checkpoint=checkpoint,
            baseline=baseline,
            output=output,
            judge_model=self.data / "judge.npz",
            num_prefixes=600,
            temperature=[1.0, 0.8],
            train_iters=1,
            rollout_batch_size=512,
        )

    def _policy(self, name: str, start: Path, judge: Path, strength: str) -> Path:
        return train(
            self.arms / name,
            "pretrain_sip.py",
            **self._policy_data(),
            **self.teacher(judge),
            pretrained_checkpoint=start,
            candidates="rollout:4",
            **POLICY[strength],
            train_iters=100,
            global_batch_size=32,
            micro_batch_size=16,
            lr_decay_style="constant",
            weight_decay=0,
            rollout_batch_size=512,
            reference_policy="synced",
            reference_sync_interval=25,
            dpo_nll_weight=0.1,
        )

    def _policy_warm_up(self) -> Path:
        """A policy that knows the language half: there is something left to be judged."""
        return train(
            self.arms / "policy",
            "pretrain_sip.py",
            **self._policy_data(),
            curriculum="ntp:100",
            train_iters=100,
            global_batch_size=32,
            micro_batch_size=32,
            lr=2e-3,
            lr_decay_style="constant",
            weight_decay=0.1,
        )

    def _policy_data(self) -> dict[str, Any]:
        """Corpora, and a prefix of 8 words before a suffix of 16, as the judge knows them."""
        return {
            "data_path": self.data / "policy_text_document",
            "test_data_path": self.data / "test_text_document",
            "seq_length": PREFIX + SUFFIX,
            "suffix_length": SUFFIX,
            "min_prefix_length": PREFIX,
            "eval_interval": 0,
            "seed": self.seed,
            **self.tokenizer,
        }

    def bench(self) -> None:
        """The coin, the trained judge, also by another prompt, and embedded ones; compared with other seeds' so far."""
        judge = self.teacher(self.judge())
        judges: Mapping[str, dict[str, Any]] = {
            "coin": self.teacher(self.warm_up()),
            "trained": judge,
            "no-prefix": {**judge, "judge_prompts": self.data / "prompts-no-prefix"},
            "embedded": {"judge_model": self.data / "judge.npz", "safety_words": self.data / "unsafe.txt"},
        }
        asked = {"quality": ("coin", "trained", "embedded", "no-prefix"), "safety": ("coin", "trained")}
        for task, names in asked.items():
            for name in names:
                # The embedded judges are the same for all seeds.
                folder = self.folder if name == "embedded" else self.arms
                files = {
                    "examples": self.data / "teacher" / f"{task}.valid.jsonl",
                    "output": folder / f"bench-{task}-{name}.jsonl",
                }
                run("tools/judge_bench.py", **files, num_examples=256, **self.tokenizer, **judges[name])
            found = [self.folder / f"bench-{task}-embedded.jsonl", *self.folder.glob(f"seed*/bench-{task}-*.jsonl")]
            run("tools/judge_bench.py", "--compare", *sorted(path for path in found if path.exists()))

    def teacher(self, judge: Path) -> dict[str, Any]:
        """Options of a checkpoint as the teacher."""
        return {
            "teacher": "model",
            "judge_checkpoint": judge,
            "judge_prompts": self.data / "prompts",
            "judge_prompt_length": 80,
            "judge_max_tokens": 10,
        }


def table(folder: Path) -> str:
    """What the runs under ``folder`` measured on held-out examples, and how the policies compare."""
    names = ("reward/quality", "reward/safety", "exact_match/safe", "exact_match/unsafe", "token_overlap/safe",
             "token_overlap/unsafe", "judge_safety/unsafe", "judge_quality/unsafe")  # fmt: skip
    lines = []
    for arm in sorted(folder.glob("seed*/*/")):
        measured = {r["step"]: r for r in _records(arm) if any(f"validation/{name}" in r for name in names)}
        for step in (min(measured), max(measured)) if measured else ():
            values = [(name, measured[step].get(f"validation/{name}")) for name in names]
            shown = ", ".join(f"{name} {value:.3f}" for name, value in values if value is not None)
            lines.append(f"{arm.parent.name} {arm.name:<9} step {step:>3}: {shown}")
    for path in sorted(folder.glob("seed*/against-*.json")):
        for comparison in json.loads(path.read_text(encoding="utf-8"))["comparisons"]:
            rate = comparison["win_rate"]
            lines.append(
                f"{path.parent.name} by-judge {path.stem} at {comparison['decoding']}, {comparison['judge']}: wins "
                f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] of {rate['num_prefixes']} prefixes"
            )
    return "\n".join(lines)


def _records(arm: Path) -> list[dict[str, Any]]:
    """What a run logged, by step."""
    path = arm / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    """Runs one stage and those that it needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("data", "warm", "judge", "rewriter", "policy", "strong", "bench", "table"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "teacher", help="everything goes here")
    parser.add_argument("--seed", type=int, default=1, help="of weights, order and sampling")
    options = parser.parse_args()
    bench = Bench(options.folder.resolve(), options.seed)
    if options.stage != "table":
        bench.make_data()
    stages: dict[str, Callable[[], object]] = {
        "data": lambda: None,
        "warm": bench.warm_up,
        "judge": bench.judge,
        "rewriter": bench.rewriter,
        "policy": bench.policy,
        "strong": lambda: bench.policy("-strong"),
        "bench": bench.bench,
        "table": lambda: print(table(options.folder.resolve())),
    }
    stages[options.stage]()


if __name__ == "__main__":
    main()
