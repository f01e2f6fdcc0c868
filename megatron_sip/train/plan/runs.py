"""Short runs that a machine is calibrated by: passes of the engine and of the rollouts, each timed by itself.

None of these shapes is one of the runs that the planner is compared with (benchmarks/plan.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_sip.data.batches import next_token_batches
from megatron_sip.data.samples import Window
from megatron_sip.distributed import ParallelContext, synchronize
from megatron_sip.engine.config import EngineConfig
from megatron_sip.engine.engine import Engine
from megatron_sip.model import ModelConfig, build_model, count_parameters
from megatron_sip.objectives import NextToken, ObjectiveConfig, OnlineDPO, SuffixNLL
from megatron_sip.preference.rows import Row, RowShape, build_rows
from megatron_sip.rollout import GenerationRequest, SeedKey
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.rollout.in_process import InProcessEngine
from megatron_sip.train.plan import costs
from megatron_sip.train.plan.costs import Rows, Share, Work
from megatron_sip.train.plan.fit import Sample
from megatron_sip.types import TrainPass

WARM_UP, REPEATS = 2, 5
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "small": ({"num_layers": 3, "hidden_size": 96, "num_attention_heads": 4, "ffn_hidden_size": 256}, 1000),
    "medium": ({"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "ffn_hidden_size": 704}, 4000),
    "wide": ({"num_layers": 2, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 1408}, 8000),
}
"""On CPU; a GPU is measured with layers of the size that it is for."""
GPU_MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "1024": ({"num_layers": 4, "hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 2816}, 32000),
    "2048": ({"num_layers": 4, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 5504}, 32000),
}
WINDOWS = ((4, 128), (2, 320), (8, 64))
"""Rows and tokens of next-token micro-batches."""
CANDIDATES = ((2, 192, 2, 48), (4, 64, 1, 32), (1, 320, 4, 24))
"""Rows, prefix, candidates and their tokens."""
ROLLOUTS = ((4, 4, 96, 24), (2, 8, 320, 12), (8, 1, 160, 32), (1, 4, 64, 24))
"""Prefixes, rollouts of each, prefix and new tokens."""
GPU_SCALE = 6
"""On a GPU prefixes and windows are this many times as long."""


@dataclass
class Measured:
    """Samples by kind of pass, in the words of ``hardware.EfficiencyConfig``."""

    samples: dict[str, list[Sample]]

    def add(self, kind: str, name: str, work: Work, seconds: float) -> None:
        self.samples.setdefault(kind, []).append(Sample(name, work, seconds))


def measure(context: ParallelContext, bf16: bool, say: Callable[[str], None]) -> Measured:
    """Runs everything on this one rank."""
    found = Measured({})
    on_gpu = context.device.type == "cuda"
    for name, (model, vocab_size) in (GPU_MODELS if on_gpu else MODELS).items():
        say(f"model {name}")
        _measure_model(found, name, Bench(model, vocab_size, context, bf16), GPU_SCALE if on_gpu else 1)
    return found


class Bench:
    """A model with its engine and rollouts on this rank."""

    def __init__(self, model: dict[str, Any], vocab_size: int, context: ParallelContext, bf16: bool) -> None:
        config = ModelConfig(**model, max_position_embeddings=4096, bf16=bf16)
        self.context, self.vocab_size = context, vocab_size
        arch = config.resolve()
        self.share = Share(arch, arch.num_layers, vocab_size, 2 if bf16 else 4)
        self.num_parameters = count_parameters(arch, vocab_size)
        chunks = build_model(config, vocab_size, context)
        self.engine = Engine(
            chunks, EngineConfig(lr=1e-4, lr_decay_style="constant"), ObjectiveConfig(reference_policy="none"), context,
            train_iters=10**6,
        )  # fmt: skip
        rollout = RolloutConfig(rollout_batch_size=10**6, rollout_stop_at_eod=False)
        self.rollouts = InProcessEngine(chunks, context, rollout, vocab_size, 0)
        self._random = np.random.default_rng(3)

    def tokens(self, count: int) -> np.ndarray:
        return self._random.integers(1, self.vocab_size, count)

    def windows(self, rows: int, length: int) -> Any:
        windows = [Window(number, self.tokens(length + 1)) for number in range(rows)]
        return next_token_batches(windows, rows)

    def rows(self, rows: int, prefix: int, candidates: int, length: int) -> Any:
        made = [Row(self.tokens(prefix), tuple(self.tokens(length) for _ in range(candidates))) for _ in range(rows)]
        return build_rows(made, RowShape(micro_batch_size=rows, candidate_block=length), candidates)

    def requests(self, groups: int, slots: int, prefix: int, new_tokens: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                sample_id=number, prefix=self.tokens(prefix), num_rollouts=slots, max_new_tokens=new_tokens,
                seed_key=SeedKey(1, 0),
            )
            for number in range(groups)
        ]  # fmt: skip


def _measure_model(found: Measured, name: str, bench: Bench, scale: int) -> None:
    clock = Clock(bench.context)
    engine, share = bench.engine, bench.share
    for label, batches, objective, rows, again in _passes(bench, scale):
        train_pass = TrainPass("calibration", batches, objective, 1e-3)

        def run(train_pass: TrainPass = train_pass) -> None:
            engine.begin_step()
            engine.run(train_pass, last=False)

        begin_s = clock(engine.begin_step)
        found.add("train", f"{name} {label}", costs.train(share, rows, again), max(clock(run) - begin_s, 1e-9))
        score_s = clock(lambda batches=batches: engine.score(batches))  # type: ignore[misc]
        found.add("forward", f"{name} {label}", costs.forward(share, rows), score_s)
    for groups, slots, prefix, new_tokens in ROLLOUTS:
        prefix *= scale
        short = bench.requests(groups, slots, prefix, 1)
        read_s = clock(lambda short=short: bench.rollouts.generate(short))  # type: ignore[misc]
        long = bench.requests(groups, slots, prefix, new_tokens)
        all_s = clock(lambda long=long: bench.rollouts.generate(long))  # type: ignore[misc]
        label = f"{name} {groups} x {slots}, {prefix} + {new_tokens}"
        found.add("prefill", label, costs.prefill(share, groups, prefix), read_s)
        found.add("decode", label, costs.decode(share, groups, slots, prefix, new_tokens), max(all_s - read_s, 1e-9))
    engine.begin_step()
    optimizer_s = clock(engine.optimizer_step)
    work = costs.optimizer(bench.num_parameters, 4, share.weight_bytes, share.num_layers, 1)
    found.add("optimizer", name, work, optimizer_s)


def _passes(bench: Bench, scale: int) -> Iterator[tuple[str, Any, Any, Rows, bool]]:
    for rows, length in WINDOWS:
        length *= scale
        yield f"{rows} windows of {length}", bench.windows(rows, length), NextToken(), Rows(rows, length, length), False
    for rows, prefix, candidates, length in CANDIDATES:
        prefix *= scale
        label = f"{rows} rows of {prefix} + {candidates} x {length}"
        batches = bench.rows(rows, prefix, candidates, length)
        width = batches[0].layout.prefix_block
        shape = Rows(rows, width, prefix, candidates, length)
        if candidates == 2:
            batches = tuple(replace(b, reference_log_probs=torch.full_like(b.mask, -5.0)) for b in batches)
            yield label, batches, OnlineDPO(beta=0.1), shape, True
        else:
            yield label, batches, SuffixNLL("calibration"), shape, False


class Clock:
    """Median seconds of a call."""

    def __init__(self, context: ParallelContext) -> None:
        self._device = context.device

    def __call__(self, call: Callable[[], object]) -> float:
        times = []
        for _ in range(WARM_UP + REPEATS):
            synchronize(self._device)
            started = time.perf_counter()
            call()
            synchronize(self._device)
            times.append(time.perf_counter() - started)
        return statistics.median(times[WARM_UP:])
