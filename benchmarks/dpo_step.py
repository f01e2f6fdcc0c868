#!/usr/bin/env python
"""Forward and backward of a shared-prefix row beside the same candidates as separate sequences, by our own engine.

    DPO pair   [prefix | chosen | rejected]             beside two sequences of prefix + candidate
    GRPO row   [prefix | candidate 1 | ... | 16]        beside 16 such sequences, two at a time

Both sides compute the same loss on the candidates' log-probs alone, and the gradients of all weights are compared. The
layers are those of a model of the hidden size; few of them are enough, as each costs the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.pairs import CLOCKS, Comparison, machine, report

Pass = Callable[[], None]


class Rows:
    """A model with gradient buffers, and one prefix with its candidates."""

    def __init__(self, options: argparse.Namespace, num_candidates: int) -> None:
        from megatron_sip.distributed import ParallelConfig, initialize
        from megatron_sip.engine.gradients import wrap_chunks
        from megatron_sip.model import ModelConfig, build_model

        self.context = initialize(ParallelConfig(), seed=1) if _context[0] is None else _context[0]
        _context[0] = self.context
        heads = options.hidden // 64
        config = ModelConfig(
            num_layers=options.layers, hidden_size=options.hidden, num_attention_heads=heads, num_query_groups=heads,
            ffn_hidden_size=64 * round(options.hidden * 8 / 3 / 64), kv_channels=64, max_position_embeddings=4096,
            untie_embeddings_and_output_weights=True, bf16=options.precision == "bf16",
        )  # fmt: skip
        chunks = build_model(config, options.vocab_size, self.context)
        (self.chunk,) = wrap_chunks(chunks, self.context, reduce_in_fp32=True)
        generator = torch.Generator().manual_seed(3)
        self.prefix = torch.randint(0, options.vocab_size, (options.prefix,), generator=generator)
        shape = (num_candidates, options.candidate)
        self.candidates = torch.randint(0, options.vocab_size, shape, generator=generator)
        self.reference = torch.randn(1, num_candidates * options.candidate, generator=generator) - 10.0
        self.advantages = torch.randn(1, num_candidates, generator=generator)

    def batch(self) -> Any:
        """The shared-prefix row."""
        from megatron_sip.preference.rows import Row, RowShape, build_rows

        row = Row(self.prefix.numpy(), tuple(c.numpy() for c in self.candidates), advantages=self.advantages[0].numpy())
        shape = RowShape(micro_batch_size=1, candidate_block=self.candidates.shape[1])
        return build_rows([row], shape, len(self.candidates))[0]

    def loss(self, log_probs: torch.Tensor, batch: Any, picked: slice) -> torch.Tensor:
        """DPO of two candidates, GRPO of more (of those in ``picked``)."""
        from dataclasses import replace

        from megatron_sip.objectives import OnlineDPO
        from megatron_sip.objectives.grpo import GRPO

        width = self.candidates.shape[1]
        columns = slice(picked.start * width, picked.stop * width)
        layout = replace(batch.layout, num_candidates=picked.stop - picked.start)
        part = replace(
            batch, layout=layout, mask=batch.mask[:, columns], reference_log_probs=self.reference[:, columns],
            advantages=self.advantages[:, picked],
        )  # fmt: skip
        objective = OnlineDPO(beta=0.1) if len(self.candidates) == 2 else GRPO()
        return objective(log_probs, part).loss_sum

    def shared(self) -> Pass:
        """One row."""
        from megatron_sip.model import ScoreTargets, SharedPrefixPlan

        batch, every = self.batch(), slice(0, len(self.candidates))

        def run() -> None:
            plan = SharedPrefixPlan(batch.layout, batch.prefix_lengths)
            log_probs = self.chunk(batch.tokens, batch.positions, plan, ScoreTargets(batch.targets, batch.sources))
            self.loss(log_probs, batch, every).backward()

        return run

    def separate(self, rows: int = 2) -> Pass:
        """``rows`` sequences at a time."""
        from megatron_sip.model import CausalPlan, ScoreTargets

        batch, prefix, width = self.batch(), len(self.prefix), self.candidates.shape[1]
        sources = torch.arange(prefix - 1, prefix + width - 1).expand(rows, width)
        positions = torch.arange(prefix + width).expand(rows, -1).contiguous()

        def run() -> None:
            for start in range(0, len(self.candidates), rows):
                picked = slice(start, start + rows)
                tokens = torch.cat((self.prefix.expand(rows, -1), self.candidates[picked]), dim=1)
                asked = ScoreTargets(self.candidates[picked], sources)
                log_probs = self.chunk(tokens, positions, CausalPlan(), asked)
                self.loss(log_probs.reshape(1, -1), batch, picked).backward()

        return run

    def gradients(self, run: Pass) -> dict[str, torch.Tensor]:
        """Of all weights, after one run."""
        self.chunk.zero_grad_buffer()
        run()
        return {name: p.main_grad.clone() for name, p in self.chunk.named_parameters()}


_context: list[Any] = [None]


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative to the largest entry of each weight's gradient."""
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours)


def compare_rows(name: str, rows: Rows, pairs: int, clock: str) -> Comparison:
    """Times both in turn; the value is the largest difference of gradients."""
    now, shared, separate = CLOCKS[clock], rows.shared(), rows.separate()
    difference = largest_difference(rows.gradients(shared), rows.gradients(separate))
    times: dict[Pass, list[float]] = {shared: [], separate: []}
    for pair in range(pairs):
        for run in (shared, separate) if pair % 2 == 0 else (separate, shared):
            rows.chunk.zero_grad_buffer()
            started = now()
            run()
            times[run].append(now() - started)
    return Comparison(name, "shared", "separate", times[shared], times[separate], f"{difference:.1e}", "(gradients)")


def main() -> None:
    """Measures the pair and the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--prefix", type=int, default=1920)
    parser.add_argument("--candidate", type=int, default=128)
    parser.add_argument("--candidates", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    print(f"{machine()}\nhidden {options.hidden}, {options.layers} layers, {options.prefix} + {options.candidate} "
          f"tokens, vocabulary {options.vocab_size}, {options.precision}", flush=True)  # fmt: skip
    found = []
    for count in options.candidates:
        name = "DPO pair" if count == 2 else f"GRPO row, K = {count}"
        comparison = compare_rows(name, Rows(options, count), options.pairs, options.clock)
        print(comparison.line(), flush=True)
        found.append(comparison.row())
        report(options.json, found, vars(options))


if __name__ == "__main__":
    main()
