"""Two ranks of one machine beside each other: what their collectives take, and how they slow each other down.

Started by ``plan.calibrate`` under torchrun; prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_sip.distributed import ParallelConfig, initialize
from megatron_sip.objectives import NextToken
from megatron_sip.train.plan.runs import MODELS, REPEATS, WARM_UP, Bench
from megatron_sip.types import TrainPass

_SMALL, _LARGE = 1024, 4 << 20
"""Bytes of the two all-reduces."""


def main() -> None:
    """Collective over two ranks."""
    context = initialize(ParallelConfig(), seed=1)
    group = context.dp_group

    def reduce(size: int) -> Callable[[], object]:
        tensor = torch.zeros(size // 4, device=context.device)
        return lambda: dist.all_reduce(tensor, group=group)

    small_s, large_s = _median(reduce(_SMALL), context.barrier), _median(reduce(_LARGE), context.barrier)
    model, vocab_size = MODELS["medium"]
    bench = Bench(model, vocab_size, context, bf16=context.device.type == "cuda")
    train_pass = TrainPass("calibration", bench.windows(4, 128), NextToken(), 1e-3)

    def run() -> None:
        bench.engine.begin_step()
        bench.engine.run(train_pass, last=False)

    alone_s = _median(run, lambda: None) if context.rank == 0 else 0.0
    context.barrier()
    both_s = _median(run, context.barrier)
    if context.rank == 0:
        slowdown = max(1.0, both_s / alone_s)
        bandwidth = _LARGE / max(large_s - small_s, 1e-9) / 1e9  # two ranks send as much as they hold
        print(json.dumps({"latency_us": small_s * 1e6, "bandwidth_gb_s": bandwidth, "slowdown": slowdown}), flush=True)
    context.barrier()
    context.shutdown()


def _median(call: Callable[[], object], before: Callable[[], object]) -> float:
    times = []
    for _ in range(WARM_UP + 2 * REPEATS):
        before()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
