#!/usr/bin/env python
"""Rollouts of our in-process engine beside ``transformers.generate``: the same weights, prefixes and numbers of tokens.

Both sides sample K continuations of each prefix at T = 1 from the whole softmax, without an end before the last token;
theirs by ``num_return_sequences``, with SDPA and its own cache. Before it is timed, each side decodes the first tokens
of its prefixes greedily, and the number of tokens on which both agree is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.pairs import CLOCKS, Step, compare, machine, report
from benchmarks.train_step import architecture, initial_weights, llama

NUM_GREEDY = 16


def _prefixes(payload: dict[str, Any]) -> torch.Tensor:
    """int64 [G, P]."""
    generator = torch.Generator().manual_seed(5)
    shape = (payload["prompts"], payload["prefix"])
    return torch.randint(3, payload["vocab_size"], shape, generator=generator)


def _with_greedy_start(greedy: list[int], sample: Step) -> Step:
    """A step whose first call returns the greedy tokens; ``compare`` does not time it."""
    values = iter([greedy])

    def step() -> Any:
        sample()
        return next(values, None)

    return step


def theirs(payload: dict[str, Any]) -> Step:
    """``LlamaForCausalLM.generate``."""
    model = llama(payload).to(torch.bfloat16 if payload["bf16"] else torch.float32).eval()
    prefixes = _prefixes(payload)
    mask = torch.ones_like(prefixes)
    common = {"attention_mask": mask, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    new = payload["new_tokens"]

    def sample() -> None:
        with torch.no_grad():
            found = model.generate(
                prefixes, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
                num_return_sequences=payload["k"], **common,
            )  # fmt: skip
        assert found.shape == (len(prefixes) * payload["k"], prefixes.shape[1] + new)

    with torch.no_grad():
        greedy = model.generate(prefixes, do_sample=False, max_new_tokens=NUM_GREEDY, **common)
    return _with_greedy_start(greedy[:, prefixes.shape[1] :].flatten().tolist(), sample)


def ours(payload: dict[str, Any]) -> Step:
    """``InProcessEngine.generate``."""
    from megatron_sip.distributed import ParallelConfig, initialize
    from megatron_sip.model import ModelConfig, build_model
    from megatron_sip.rollout import GenerationRequest, InProcessEngine, RolloutConfig, SeedKey
    from tests.model.hf_weights import load_llama

    context = initialize(ParallelConfig(), seed=1)
    config = ModelConfig(**architecture(payload), bf16=payload["bf16"])
    chunks = build_model(config, payload["vocab_size"], context)
    load_llama(chunks, initial_weights(payload), config.resolve(), context)
    prefixes = _prefixes(payload).numpy()
    options = RolloutConfig(rollout_stop_at_eod=False, rollout_batch_size=len(prefixes) * payload["k"])
    engine = InProcessEngine(list(chunks), context, options, payload["vocab_size"], eod=0)
    engine.sync_weights(0)

    def requests(k: int, new: int, greedy: bool, step: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(sample, prefix, k, new, SeedKey(1, step), greedy=greedy)
            for sample, prefix in enumerate(prefixes)
        ]

    steps = iter(range(10**9))

    def sample() -> None:
        found = engine.generate(requests(payload["k"], payload["new_tokens"], False, next(steps)))
        assert sum(len(c.tokens) for group in found for c in group) == payload["rollout_tokens"]

    greedy = [c.tokens for [c] in engine.generate(requests(1, NUM_GREEDY, True, 0))]
    return _with_greedy_start([int(token) for tokens in greedy for token in tokens], sample)


def main() -> None:
    """Measures every combination of the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    print(f"{machine()}\n{options.layers} layers, {options.prompts} prefixes of {options.prefix} tokens, "
          f"{options.new_tokens} new ones, vocabulary {options.vocab_size}", flush=True)  # fmt: skip
    rows = []
    for hidden in options.hidden:
        for precision in options.precision:
            for k in options.k:
                tokens = options.prompts * k * options.new_tokens
                payload = {
                    **vars(options), "hidden": hidden, "bf16": precision == "bf16", "k": k, "rollout_tokens": tokens,
                    "sequence_length": options.prefix + options.new_tokens,
                }  # fmt: skip
                found = compare(
                    f"hidden {hidden}, {precision}, K = {k}",
                    ("megatron_sip", "benchmarks.rollout:ours"),
                    ("transformers", "benchmarks.rollout:theirs"),
                    payload, options.pairs, tokens=tokens, clock=options.clock,
                )  # fmt: skip
                pairs = zip(found.ours_value, found.theirs_value, strict=True)
                equal = f"{sum(a == b for a, b in pairs)} of {len(found.ours_value)} greedy tokens equal"
                found = found.with_values(equal, "")
                print(found.line(), flush=True)
                rows.append(found.row())
                report(options.json, rows, vars(options))


if __name__ == "__main__":
    main()
