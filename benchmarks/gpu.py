#!/usr/bin/env python
"""Everything that matters on one NVIDIA GPU: training's MFU, decoding's share of the memory's speed, log-probs' memory.

    ntp       a whole next-token step (forward, backward, clipping, AdamW)              target: MFU of 50 %
    dpo       the train part of an online-DPO step on shared-prefix rows                target: 85 % of ntp's MFU
    prefill   rollouts of one token: the prefixes' forward pass
    decode    rollouts by the in-process engine, less the time of their first token     target: 50 % of the bandwidth
    memory    log-probs and gradients at a vocabulary of 128,256                        target: 25 % of float32 logits

MFU = model FLOPs of a step / its seconds / the device's peak (benchmarks/flops.py has both). Model FLOPs are
Megatron-LM's: 6 per token and weight of the layers, 6 per scored position and weight of the output layer, 12 h d per
layer and pair of a query and a key that it attends to (h heads of width d; S^2 / 2 pairs in a causal sequence of S). A
shared row counts what it needs and not what separate sequences would: its prefix once, the output layer on its
candidates alone. Nothing that is computed twice (logits of DPO) counts twice.

Bandwidth = bytes that a decode step must read / its seconds / the peak. Each prefix's keys and values count once, for
all of its rollouts; the figure with one reading per rollout stands beside it.

Needs torch with CUDA and megatron-core; neither Transformer Engine nor Apex. ``--device cpu --size tiny`` runs all of
it anywhere, without fractions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.flops import Peak, RowWork, decode_bytes, forward_flops, peak_of
from benchmarks.logprob_memory import WAYS, way_log_probs
from benchmarks.pairs import machine, report


@dataclass(frozen=True)
class Size:
    """Of the model and of its work; widths in tokens."""

    preset: str
    vocab_size: int
    sequence: int
    micro_batch: int
    num_micro_batches: int
    prefix: int
    candidate: int
    decode_prefixes: int
    rollouts: int
    new_tokens: int
    memory_vocab: int
    memory_hidden: int
    memory_positions: tuple[int, ...]


SIZES = {
    "1.4b": Size("llama2-1.4b", 32000, 2048, 4, 8, 1920, 128, 16, 16, 128, 128256, 2048, (2048, 1024, 512)),
    "tiny": Size("tiny", 512, 64, 2, 2, 48, 16, 2, 2, 8, 4096, 64, (64,)),
}


class Bench:
    """A model, its engine, and a clock that waits for the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        from megatron_sip.distributed import ParallelConfig, initialize
        from megatron_sip.engine.config import EngineConfig
        from megatron_sip.engine.engine import Engine
        from megatron_sip.model import ModelConfig, build_model
        from megatron_sip.objectives import ObjectiveConfig

        self.options = options
        self.size = SIZES[options.size]
        self.context = initialize(ParallelConfig(), seed=1)
        self.device = self.context.device
        self.peak = _peak(options, self.device)
        config = ModelConfig(preset=self.size.preset, bf16=True, transformer_impl="local")
        self.architecture = config.resolve()
        self.chunks = build_model(config, self.size.vocab_size, self.context)
        self.engine = Engine(
            self.chunks,
            EngineConfig(lr=1e-5, lr_decay_style="constant"),
            ObjectiveConfig(reference_policy="none"),
            self.context,
            train_iters=1000,
        )
        self.random = np.random.default_rng(5)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median over the steps, after two that do not count."""
        from megatron_sip.distributed import synchronize

        found = []
        for _ in range(2 + self.options.steps):
            synchronize(self.device)
            started = time.perf_counter()
            work()
            synchronize(self.device)
            found.append(time.perf_counter() - started)
        return statistics.median(found[2:])

    def tokens(self, *shape: int) -> Any:
        """Random ids, int64."""
        return self.random.integers(0, self.size.vocab_size, shape)

    def mfu(self, flops: float, took_s: float) -> float | None:
        """None without a known peak."""
        return None if self.peak is None else flops / took_s / self.peak.flops_per_s


def _peak(options: argparse.Namespace, device: torch.device) -> Peak | None:
    if options.peak_tflops is not None and options.peak_gb_s is not None:
        return Peak(options.peak_tflops * 1e12, options.peak_gb_s * 1e9)
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_of(name)
    if peak is None:
        raise SystemExit(f"the peak of {name!r} is not in benchmarks/flops.py: give --peak-tflops and --peak-gb-s.")
    return peak


def _train_step(bench: Bench, name: str, batches: Any, objective: Any, row: RowWork) -> dict[str, Any]:
    """Times a whole step, and its forward-backward part alone."""
    from megatron_sip.types import TrainPass

    train_pass = TrainPass(name, batches, objective, 1.0 / sum(objective.units(batch) for batch in batches))

    def forward_backward() -> None:
        bench.engine.begin_step()
        bench.engine.run(train_pass, last=True)

    def step() -> None:
        forward_backward()
        bench.engine.optimizer_step()

    forward_backward_s, step_s = bench.seconds(forward_backward), bench.seconds(step)
    num_rows = sum(batch.num_rows for batch in batches)
    flops = 3 * num_rows * forward_flops(bench.architecture, bench.size.vocab_size, row)
    return {
        "part": name,
        "rows": num_rows,
        "tokens_per_row": row.tokens,
        "step_s": step_s,
        "forward_backward_s": forward_backward_s,
        "tokens_per_s": num_rows * row.tokens / step_s,
        "model_tflops": flops / 1e12,
        "mfu": bench.mfu(flops, step_s),
        "mfu_forward_backward": bench.mfu(flops, forward_backward_s),
        "peak_memory_bytes": _peak_bytes(bench.device),
    }


def ntp(bench: Bench) -> list[dict[str, Any]]:
    """See the module."""
    from megatron_sip.data.batches import next_token_batches
    from megatron_sip.data.samples import Window
    from megatron_sip.objectives import NextToken

    size = bench.size
    ids = bench.tokens(size.micro_batch * size.num_micro_batches, size.sequence + 1)
    batches = next_token_batches([Window(n, row) for n, row in enumerate(ids)], size.micro_batch)
    return [_train_step(bench, "ntp", batches, NextToken(), RowWork(size.sequence))]


def dpo(bench: Bench) -> list[dict[str, Any]]:
    """See the module. The reference's log-probs, here the policy's own, are scored beforehand and timed beside it."""
    from dataclasses import replace

    from megatron_sip.objectives import OnlineDPO
    from megatron_sip.preference.rows import Row, RowShape, build_rows

    size = bench.size
    rows = [
        Row(bench.tokens(size.prefix), tuple(bench.tokens(2, size.candidate)))
        for _ in range(size.micro_batch * size.num_micro_batches)
    ]
    batches = build_rows(rows, RowShape(size.micro_batch, size.candidate), num_candidates=2)
    reference_s = bench.seconds(lambda: bench.engine.score(batches))
    scored = bench.engine.score(batches)
    known = [replace(batch, reference_log_probs=s) for batch, s in zip(batches, scored, strict=True)]
    work = RowWork(size.prefix, 2, size.candidate)
    found = _train_step(bench, "dpo", tuple(known), OnlineDPO(), work)
    flops = len(rows) * forward_flops(bench.architecture, size.vocab_size, work)
    return [{**found, "reference_s": reference_s, "mfu_reference": bench.mfu(flops, reference_s)}]


def _generate(bench: Bench, prefixes: Any, rollouts: int, new_tokens: int) -> Callable[[], object]:
    from megatron_sip.rollout import GenerationRequest, InProcessEngine, RolloutConfig, SeedKey

    config = RolloutConfig(rollout_batch_size=len(prefixes) * rollouts, rollout_stop_at_eod=False)
    engine = InProcessEngine(bench.chunks, bench.context, config, bench.size.vocab_size, eod=0)
    requests = [
        GenerationRequest(number, prefix, rollouts, new_tokens, SeedKey(1, 0)) for number, prefix in enumerate(prefixes)
    ]
    return lambda: engine.generate(requests)


def prefill(bench: Bench) -> list[dict[str, Any]]:
    """See the module. The output layer is needed for a prefix's last position alone."""
    size = bench.size
    prefixes = bench.tokens(size.decode_prefixes, size.prefix)
    took_s = bench.seconds(_generate(bench, prefixes, 1, 1))
    output = 2.0 * size.vocab_size * bench.architecture.hidden_size * (size.prefix - 1)
    flops = forward_flops(bench.architecture, size.vocab_size, RowWork(size.prefix)) - output
    return [{
        "part": "prefill", "prefixes": len(prefixes), "prefix": size.prefix, "took_s": took_s,
        "tokens_per_s": prefixes.size / took_s, "mfu": bench.mfu(flops * len(prefixes), took_s),
    }]  # fmt: skip


def decode(bench: Bench) -> list[dict[str, Any]]:
    """See the module."""
    size = bench.size
    prefixes = bench.tokens(size.decode_prefixes, size.prefix)
    first_s = bench.seconds(_generate(bench, prefixes, size.rollouts, 1))
    whole_s = bench.seconds(_generate(bench, prefixes, size.rollouts, size.new_tokens))
    num_steps, num_rows = size.new_tokens - 1, size.decode_prefixes * size.rollouts
    step_s = (whole_s - first_s) / num_steps
    per_prefix, per_row = (
        decode_bytes(bench.architecture, size.vocab_size, [size.prefix] * n, num_rows // n, (size.new_tokens + 1) / 2)
        for n in (size.decode_prefixes, num_rows)
    )
    speed = None if bench.peak is None else bench.peak.bytes_per_s
    return [{
        "part": "decode", "rows": num_rows, "prefix": size.prefix, "step_s": step_s, "first_token_s": first_s,
        "tokens_per_s": num_rows / step_s, "tokens_per_s_with_prefill": num_rows * size.new_tokens / whole_s,
        "gigabytes_per_step": per_prefix / 1e9, "bandwidth": None if speed is None else per_prefix / step_s / speed,
        "bandwidth_prefix_per_row": None if speed is None else per_row / step_s / speed,
        "peak_memory_bytes": _peak_bytes(bench.device),
    }]  # fmt: skip


def memory(bench: Bench) -> list[dict[str, Any]]:
    """See the module. On a CPU without the memory, which is not the allocator's to tell (logprob_memory.py is)."""
    size, group = bench.size, bench.context.tp_group
    found = []
    for positions in size.memory_positions:
        for way in WAYS:
            generator = torch.Generator(bench.device).manual_seed(0)
            drawn: dict[str, Any] = {"generator": generator, "device": bench.device}
            hidden = torch.randn(positions, size.memory_hidden, **drawn).bfloat16().requires_grad_()
            weight = (torch.randn(size.memory_vocab, size.memory_hidden, **drawn) * 0.02).bfloat16().requires_grad_()
            setattr(weight, "main_grad", torch.zeros(weight.shape, device=bench.device))  # noqa: B010 (as Megatron's DDP does)
            targets = torch.randint(0, size.memory_vocab, (positions,), **drawn)
            before = _peak_bytes(bench.device, restart=True)
            log_probs = way_log_probs(way, hidden, weight, targets, group)
            log_probs.sum().backward()
            used = None if before is None else (_peak_bytes(bench.device) or 0) - before
            logits = positions * size.memory_vocab * 4
            found.append({
                "part": "memory", "way": way, "positions": positions, "vocabulary": size.memory_vocab,
                "used_bytes": used, "of_full_logits": None if used is None else used / logits,
                "log_prob": float(log_probs.detach().mean()),
            })  # fmt: skip
            del log_probs, hidden, weight
    return found


def _peak_bytes(device: torch.device, restart: bool = False) -> int | None:
    """Most memory of the device in use since the last restart; with one, what is in use now."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    if restart:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "ntp": ntp, "dpo": dpo, "prefill": prefill, "decode": decode, "memory": memory,
}  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    def shown(name: str, value: Any) -> str:
        if value is None:
            return "-"
        if name.endswith("_bytes"):
            return f"{value / 2**30:.3f} GiB"
        if name.startswith(("mfu", "bandwidth", "of_")):
            return f"{value:.1%}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name} {shown(name, value)}" for name, value in row.items() if name != "part")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the parts in turn; returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="1.4b")
    parser.add_argument("--parts", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--steps", type=int, default=5, help="timed repetitions of which the median is taken")
    parser.add_argument("--peak-tflops", type=float, help="bfloat16 peak, for a device that is not in the table")
    parser.add_argument("--peak-gb-s", type=float, help="its memory's speed")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible: run on a machine with a GPU, or with --device cpu --size tiny.")
    bench = Bench(options)
    name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{machine()}\n{name}, peak {bench.peak and asdict(bench.peak)}\n{bench.size}", flush=True)
    rows: list[dict[str, Any]] = []
    for part in options.parts:
        _peak_bytes(bench.device, restart=True)
        for row in PARTS[part](bench):
            print(f"{part:8} {_line(row)}", flush=True)
            rows.append({**row, "device": name})
        report(options.json, rows, vars(options))
    shares = {row["part"]: row["mfu"] for row in rows if row["part"] in ("ntp", "dpo") and row["mfu"]}
    if len(shares) == 2:
        print(f"dpo's MFU is {shares['dpo'] / shares['ntp']:.1%} of ntp's")
    return rows


if __name__ == "__main__":
    main()
