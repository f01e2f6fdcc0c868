#!/usr/bin/env python
"""Trains a judge and a rewriter by GRPO, then policies by that judge and by a coin, in a language of 32 words.

    benchmarks/teacher.py data; benchmarks/teacher.py judge --seed 1; benchmarks/teacher.py rewriter --seed 1; \\
        benchmarks/teacher.py policy --seed 1; benchmarks/teacher.py table

Every stage runs the tools that a user runs, one rank, one core. A stage that was stopped goes on where it was; one that
has finished does nothing. Results: docs/results/teacher.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.teacher_world import UNSAFE_WORDS, documents, warm_up_texts, write_lines, write_templates
from megatron_sip.tokenizer.training import train_sentencepiece

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE, SUFFIX, PREFIX = 380, 16, 8
NOISE = 0.2
MODEL = shlex.split(
    "--num-layers 3 --hidden-size 96 --num-attention-heads 4 --num-query-groups 4 --ffn-hidden-size 256 "
    "--max-position-embeddings 256 --make-vocab-size-divisible-by 4 --no-untie-embeddings-and-output-weights "
    "--init-method-std 0.05"
)
Words = list[str | Path]
ADAM = ["--adam-beta2", "0.95", "--log-interval", "20"]
EXAMPLES = {"warm": (8000, 2000, 4000, 256), "teacher": (16000, 4000, 8000, 512)}
"""Quality, safety, rewrite examples for training, and of each for validation."""


def run(command: Sequence[str | Path]) -> None:
    """Runs a tool; ends this program if it fails."""
    words = [str(word) for word in command]
    print("$", " ".join(word.replace(str(ROOT) + "/", "") for word in words), flush=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    status = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def train(arm: Path, tool: str, *flags: str | Path) -> None:
    """A training run under ``arm``, resumed if it was stopped, skipped if it has finished."""
    if not (arm / "finished.json").exists():
        saved: Words = ["--save", arm / "checkpoints", "--load", arm / "checkpoints", "--save-interval", "50"]
        folders: Words = ["--keep-last", "1", "--run-dir", arm, "--tensorboard-dir", arm / "tensorboard"]
        run([ROOT / tool, *saved, *folders, *MODEL, *ADAM, *flags])


class Bench:
    """Stages by name; ``folder`` holds everything."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.data = folder / "data"
        self.folder = folder
        self.arms = folder / f"seed{seed}"
        self.seed = str(seed)
        self.tokenizer: Words = [
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            self.data / "world.model",
        ]
        self.words: Words = ["--safety-words", self.data / "unsafe.txt"]
        self.lengths: Words = ["--example-suffix-length", str(SUFFIX), "--example-prefix-length", str(PREFIX)]

    def make_data(self) -> None:
        """Documents, tokenizer, examples, warm-up texts, tokenized corpora, the n-gram judge."""
        data = self.data
        if (data / "judge.npz").exists():
            return
        write_templates(data / "prompts")
        (data / "unsafe.txt").write_text("\n".join(word.strip() for word in UNSAFE_WORDS) + "\n", encoding="utf-8")
        for number, (name, count) in enumerate(
            {"policy": 6000, "warm": 24000, "teacher": 48000, "ngram": 6000, "test": 2000}.items()
        ):
            write_lines(data / f"{name}.jsonl", documents(count, number))
        write_lines(data / "vocabulary.jsonl", [*documents(2000, 9), *_verdict_lines()])
        train_sentencepiece([data / "vocabulary.jsonl"], data / "world.model", VOCAB_SIZE, num_threads=1)
        for name, (quality, safety, rewrite, valid) in EXAMPLES.items():
            counts = {"quality": quality, "safety": safety, "rewrite": rewrite}
            wanted = [
                word
                for kind, count in counts.items()
                for word in (f"--{kind}-train", str(count), f"--{kind}-valid", str(valid))
            ]
            rules = [
                "--corruption-kinds",
                "replace",
                "--corruption-share",
                "0.5",
                "--safety-words",
                data / "unsafe.txt",
            ]
            places: Words = [
                "--input",
                data / f"{name}.jsonl",
                "--output",
                data / name,
                "--example-min-prefix-length",
                "8",
            ]
            run(
                [
                    ROOT / "tools/make_judge_data.py",
                    *places,
                    *wanted,
                    *rules,
                    *self.words,
                    *self.lengths,
                    *self.tokenizer,
                ]
            )
        write_lines(data / "prompts.jsonl", warm_up_texts(data / "warm", NOISE, 1))
        for name in ("policy", "prompts", "ngram", "test"):
            output: Words = ["--output-prefix", data / name, "--append-eod", "--workers", "1"]
            run([ROOT / "tools/preprocess_data.py", "--input", data / f"{name}.jsonl", *output, *self.tokenizer])
        fitted: Words = ["--output", data / "judge.npz", "--order", "3"]
        run([ROOT / "tools/fit_judge.py", "--data-path", data / "ngram_text_document", *fitted])

    def warm_up(self) -> Path:
        """The language, and the form of answers: next-token training on documents and prompts with idle answers."""
        arm = self.arms / "warm"
        train(
            arm,
            "pretrain_sip.py",
            *self.tokenizer,
            *("--data-path", "1", self.data / "policy_text_document", "2", self.data / "prompts_text_document"),
            *("--curriculum", "ntp:700", "--train-iters", "700", "--eval-interval", "0", "--seed", self.seed),
            *("--seq-length", "120", "--suffix-length", str(SUFFIX), "--min-prefix-length", str(PREFIX)),
            *("--micro-batch-size", "16", "--global-batch-size", "16", "--lr", "2e-3", "--lr-decay-style", "cosine"),
            *("--min-lr", "2e-4", "--lr-warmup-iters", "20", "--weight-decay", "0.1"),
        )
        return arm / "checkpoints"

    def judge(self) -> Path:
        """GRPO on quality and safety."""
        start, arm = self.warm_up(), self.arms / "judge"
        examples = self.data / "teacher"
        train(
            arm,
            "tools/train_judge.py",
            *self.tokenizer,
            *("--pretrained-checkpoint", start, "--judge-prompts", self.data / "prompts", "--seed", self.seed),
            *("--train-data", "3", examples / "quality.train.jsonl", "1", examples / "safety.train.jsonl"),
            *("--valid-data", "1", examples / "quality.valid.jsonl", "1", examples / "safety.valid.jsonl"),
            *("--train-iters", "160", "--eval-interval", "20", "--eval-samples", "512"),
            *("--global-batch-size", "32", "--micro-batch-size", "32", "--generations", "16"),
            *("--prompt-length", "80", "--rollout-max-new-tokens", "10", "--rollout-batch-size", "512"),
            *("--lr", "3e-4", "--lr-decay-style", "constant", "--weight-decay", "0"),
        )
        return arm / "checkpoints"

    def rewriter(self) -> Path:
        """GRPO on eq. 1 and eq. 2, whose judge is the one that was just trained."""
        judge, arm = self.judge(), self.arms / "rewriter"
        examples = self.data / "teacher"
        train(
            arm,
            "tools/train_rewriter.py",
            *self.tokenizer,
            *("--pretrained-checkpoint", self.warm_up(), "--seed", self.seed),
            *("--train-data", examples / "rewrite.train.jsonl", "--valid-data", examples / "rewrite.valid.jsonl"),
            *("--train-iters", "200", "--eval-interval", "20", "--eval-samples", "256"),
            *("--global-batch-size", "16", "--micro-batch-size", "16", "--generations", "16"),
            *("--prompt-length", "80", "--rollout-max-new-tokens", str(SUFFIX), "--rollout-batch-size", "512"),
            *("--lr", "3e-4", "--lr-decay-style", "constant", "--weight-decay", "0"),
            *self.teacher(judge),
        )
        return arm / "checkpoints"

    def policy(self) -> None:
        """Two policies from one start: judged by the trained judge, and by what it was before: a coin."""
        start, trained = self.policy_warm_up(), self.judge()
        for name, judge in (("by-judge", trained), ("by-coin", self.warm_up())):
            train(
                self.arms / name,
                "pretrain_sip.py",
                *self.policy_data(),
                *("--curriculum", "ntp=0.5,rollout=0.5:100", "--train-iters", "100", "--global-batch-size", "32"),
                *("--micro-batch-size", "16", "--pretrained-checkpoint", start, "--candidates", "rollout:4"),
                *("--lr", "3e-4", "--lr-decay-style", "constant", "--weight-decay", "0", "--rollout-batch-size", "512"),
                *("--reference-policy", "synced", "--reference-sync-interval", "25", "--dpo-nll-weight", "0.1"),
                *self.teacher(judge),
            )
        for baseline, where in (("by-coin", self.arms / "by-coin/checkpoints"), ("start", start)):
            output = self.arms / f"against-{baseline}.json"
            if not output.exists():
                arms: Words = [
                    "--checkpoint",
                    self.arms / "by-judge/checkpoints",
                    "--baseline",
                    where,
                    "--output",
                    output,
                ]
                asked: Words = [
                    "--judge",
                    self.data / "judge.npz",
                    "--num-prefixes",
                    "600",
                    "--temperature",
                    "1.0",
                    "0.8",
                ]
                fixed = ["--train-iters", "1", "--rollout-batch-size", "512"]
                run([ROOT / "tools/evaluate.py", *arms, *asked, *fixed, *MODEL, *self.policy_data()])

    def policy_warm_up(self) -> Path:
        """A policy that knows the language half: there is something left to be judged."""
        arm = self.arms / "policy"
        train(
            arm,
            "pretrain_sip.py",
            *self.policy_data(),
            *("--curriculum", "ntp:100", "--train-iters", "100", "--global-batch-size", "32"),
            *("--micro-batch-size", "32", "--lr", "2e-3", "--lr-decay-style", "constant", "--weight-decay", "0.1"),
        )
        return arm / "checkpoints"

    def policy_data(self) -> Words:
        """Corpora, and a prefix of 8 words before a suffix of 16, as the judge knows them."""
        corpora = [
            "--data-path",
            self.data / "policy_text_document",
            "--test-data-path",
            self.data / "test_text_document",
        ]
        sizes = [
            "--seq-length",
            str(PREFIX + SUFFIX),
            "--suffix-length",
            str(SUFFIX),
            "--min-prefix-length",
            str(PREFIX),
        ]
        return [*corpora, *map(str, sizes), *self.tokenizer, "--eval-interval", "0", "--seed", self.seed]

    def teacher(self, judge: Path, votes: int = 1) -> Words:
        """Flags of the trained judge as the teacher."""
        asked = ["--judge-prompt-length", "80", "--judge-max-tokens", "10", "--judge-votes", str(votes)]
        return ["--teacher", "model", "--judge-checkpoint", judge, "--judge-prompts", self.data / "prompts", *asked]


def _verdict_lines() -> list[str]:
    return [f"Q ; ; :{verdict}" for verdict in ("Conclusion: Option 1", "Conclusion: Option 2")] * 300 + [
        f"S :{verdict} R =" for verdict in (" FINAL DECISION: YES", " FINAL DECISION: NO")
    ] * 300


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
    parser.add_argument("stage", choices=("data", "warm", "judge", "rewriter", "policy", "table"))
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
        "table": lambda: print(table(options.folder.resolve())),
    }
    stages[options.stage]()


if __name__ == "__main__":
    main()
