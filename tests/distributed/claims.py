"""What the ranks of a launch report about themselves."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.distributed import ParallelConfig, initialize


def describe_and_talk(sizes: dict[str, int]) -> dict[str, Any]:
    """Every field of the context that a test can check, and the outcome of every collective."""
    context = initialize(ParallelConfig(**sizes), seed=7)
    report = {
        "rank": context.rank,
        "coordinates": (context.tp_rank, context.pp_rank, context.dp_rank),
        "sizes": (context.tp_size, context.pp_size, context.dp_size),
        "leader": context.is_leader,
        "first": context.is_first_stage,
        "last": context.is_last_stage,
        "group_ranks": [
            dist.get_process_group_ranks(group)
            for group in (context.tp_group, context.pp_group, context.dp_group, context.model_parallel_group)
        ],
        "from_leader": context.broadcast_object({"rank": context.rank}),
        "from_last_stage": context.broadcast_from_last_stage({"rank": context.rank}),
        "from_zero": context.broadcast_from_rank_zero({"rank": context.rank}),
        "gathered": context.gather_over_data_parallel(context.rank),
        "sum": context.sum_over_data_parallel({"one": 1, "tiny": 1e-17, "rank": float(context.rank)}),
        "any_last": context.any_rank(context.rank == context.world_size - 1),
        "any_none": context.any_rank(False),
    }
    context.barrier()
    context.shutdown()
    report["open_after_shutdown"] = dist.is_initialized()
    return report


def fail_on_rank_one(_: None) -> None:
    """Rank 1 raises while rank 0 waits for it in a collective."""
    context = initialize(ParallelConfig(), seed=0)
    if context.rank == 1:
        raise ZeroDivisionError("on purpose")
    context.barrier()


def optimizer_names_and_generators(_: None) -> dict[str, Any]:
    """What Megatron-Core sees of the CPU platform."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    context = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=3)
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(3).tolist()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_cuda = torch.ones(2, device="cuda").cuda().to("cuda:0").to(device=torch.device("cuda"))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return {
        "device": str(context.device),
        "available": torch.cuda.is_available(),
        "tensor_device": str(on_cuda.device),
        "types": [torch.ones(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16)],
        "cast": torch.ones(1).type(torch.bfloat16).dtype is torch.bfloat16,
        "forked": forked,
        "outer_stream_kept": torch.rand(3).tolist() == expected,
        "pinned": torch.ones(1, pin_memory=True).pin_memory().tolist(),
    }


def leave_a_process(payload: object) -> int:
    """Starts a process that would outlive its rank by ten minutes; returns its number."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
