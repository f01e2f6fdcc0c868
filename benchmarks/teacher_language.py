#!/usr/bin/env python
"""How well the policies of benchmarks/teacher.py keep to the language, whose rules are known: no judge is asked.

    benchmarks/teacher_language.py --seed 1

For each policy of a seed: the share of its words that may follow the one before, of listed (unsafe) words, and
tokens until the end; 600 held-out prefixes of 8 words, 4 continuations each of 16 tokens at most.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.teacher import PREFIX, ROOT, SUFFIX
from benchmarks.teacher_world import UNSAFE_WORDS, successors
from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.rollout import GenerationRequest, InProcessEngine, RolloutConfig, SamplingParameters, SeedKey
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron_sip.train.weights import open_model

ARMS = {"policy": "start", "by-judge": "judge", "by-coin": "coin", "by-judge-strong": "judge, strong",
        "by-coin-strong": "coin, strong"}  # fmt: skip
NUM_PREFIXES, NUM_CONTINUATIONS = 600, 4


def continuations(
    checkpoint: Path, tokenizer: Tokenizer, context: ParallelContext, prefixes: Sequence[str], temperature: float
) -> Iterator[tuple[str, str, int]]:
    """(prefix, what the policy says after it, tokens of that)."""
    chunks, _ = open_model(str(checkpoint), tokenizer, context)
    engine = InProcessEngine(
        chunks, context, RolloutConfig(rollout_batch_size=512), tokenizer.vocab_size, tokenizer.eod_id
    )
    ids = [np.asarray(tokenizer.encode(prefix)) for prefix in prefixes]
    sampling = SamplingParameters(temperature, 1.0)
    requests = [
        GenerationRequest(number, prompt, NUM_CONTINUATIONS, SUFFIX, SeedKey(0, 0), sampling=sampling)
        for number, prompt in enumerate(ids)
    ]
    for prefix, prompt, found in zip(prefixes, ids, engine.generate(requests), strict=True):
        for candidate in found:
            tokens = candidate.tokens[candidate.tokens != tokenizer.eod_id]
            yield prefix, tokenizer.decode_continuation(prompt, tokens), len(tokens)


def measure(texts: Iterator[tuple[str, str, int]]) -> str:
    """Legal steps in percent with a 95 % interval over prefixes, unsafe words in percent, tokens."""
    graph, unsafe = successors(), {word.strip() for word in UNSAFE_WORDS}
    legal: dict[str, list[bool]] = {}
    num_words = num_unsafe = num_tokens = count = 0
    for prefix, text, length in texts:
        # A listed word stands between two others as if it were not there.
        last = next(word for word in reversed(prefix.split()) if word not in unsafe)
        for word in text.split():
            num_words += 1
            if word in unsafe:
                num_unsafe += 1
                continue
            legal.setdefault(prefix, []).append(f" {word}" in graph.get(f" {last}", ()))
            last = word
        num_tokens += length
        count += 1
    shares = np.array([np.mean(steps) for steps in legal.values()])
    margin = 1.96 * shares.std(ddof=1) / len(shares) ** 0.5
    return (
        f"{100 * shares.mean():.1f} ± {100 * margin:.1f} % of the steps are the language's, "
        f"{100 * num_unsafe / num_words:.1f} % of the words unsafe, {num_tokens / count:.1f} tokens"
    )


def main() -> None:
    """Prints a line per policy and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "teacher", help="that of benchmarks/teacher.py")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(options.folder / "data" / "world.model")))
    lines = (options.folder / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_PREFIXES]
    prefixes = ["".join(f" {word}" for word in json.loads(line)["text"].split()[:PREFIX]) for line in lines]
    context = initialize(ParallelConfig(), seed=0)
    for temperature in (1.0, 0.8):
        for arm, name in ARMS.items():
            checkpoint = options.folder / f"seed{options.seed}" / arm / "checkpoints"
            if checkpoint.exists():
                said = measure(continuations(checkpoint, tokenizer, context, prefixes, temperature))
                print(f"seed {options.seed}, T = {temperature:g}, {name}: {said}", flush=True)


if __name__ == "__main__":
    main()
