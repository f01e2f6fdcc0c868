#!/usr/bin/env python
"""Peak memory of the log-probs of a row's candidates at a large vocabulary, forward and backward.

What a process holds in addition to its inputs, weights and gradient buffer, as its resident set says, in multiples of
one full float32 tensor of logits [positions, vocabulary]; and the CPU time. Each way runs in a process of its own.

    full        logits in float32, log_softmax, gather, by autograd (what a model that returns logits does)
    blocks      ours, for a loss whose gradient is not known beforehand (DPO, GRPO)
    linear      ours, for a linear loss (next token, RF-NLL)
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from benchmarks.pairs import machine, report

WAYS = ("full", "blocks", "linear")


def way_log_probs(
    way: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, group: Any
) -> torch.Tensor:
    """float32 [n] from hidden states [n, H] and weight [v, H], one of ``WAYS``."""
    if way == "full":
        logits = F.linear(hidden, weight).float()
        return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    from megatron_sip.model.output_layer import target_log_probs

    known = torch.ones(len(targets), device=targets.device) if way == "linear" else None
    return target_log_probs(hidden, weight, targets, len(weight), group, known)


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak beyond the start in bytes, CPU seconds, and a checksum of the gradient."""
    from megatron_sip.distributed import ParallelConfig, initialize

    group = initialize(ParallelConfig(), seed=0).tp_group
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    # Drawn in place: a larger copy on the way would be the peak that the rest hides behind.
    hidden = torch.randn(options.positions, options.hidden, dtype=dtype).requires_grad_()
    weight = torch.randn(options.vocab_size, options.hidden, dtype=dtype).mul_(0.02).requires_grad_()
    weight.main_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
    targets = torch.randint(0, options.vocab_size, (options.positions,))
    way_log_probs(way, hidden[:1], weight, targets[:1], group)  # libraries load what they load
    weight.main_grad.fill_(1.0)  # type: ignore[attr-defined]  # the linear way has added to it
    before, started = _peak_bytes(), time.process_time()
    log_probs = way_log_probs(way, hidden, weight, targets, group)
    log_probs.sum().backward()
    if way == "full":  # as DDP's hook does
        assert weight.grad is not None
        weight.main_grad += weight.grad  # type: ignore[attr-defined]
    took_s = time.process_time() - started
    assert hidden.grad is not None
    return {
        "way": way,
        "extra_bytes": _peak_bytes() - before,
        "cpu_s": took_s,
        "log_prob": float(log_probs.detach().mean()),
        "gradient_norm": float(hidden.grad.float().norm()),
        "weight_gradient_sum": float((weight.main_grad - 1).abs().sum()),  # type: ignore[attr-defined]
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measures all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048, help="16 candidates of 128 tokens")
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    logits = options.positions * options.vocab_size * 4
    print(f"{machine()}\n{options.positions} positions, vocabulary {options.vocab_size}, hidden {options.hidden}, "
          f"{options.precision}; full float32 logits: {logits / 2**20:.0f} MiB", flush=True)  # fmt: skip
    rows = []
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (way, options))
        row["of_full_logits"] = row["extra_bytes"] / logits
        print(f"{way:8} {row['extra_bytes'] / 2**20:8.0f} MiB = {row['of_full_logits']:.3f} of the logits, "
              f"{row['cpu_s']:6.1f} CPU s, log-prob {row['log_prob']:.5f}, norms {row['gradient_norm']:.5f} "
              f"{row['weight_gradient_sum']:.1f}", flush=True)  # fmt: skip
        rows.append(row)
    report(options.json, rows, vars(options))


if __name__ == "__main__":
    main()
