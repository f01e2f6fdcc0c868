"""What the ranks run to count the kernels of an optimizer step and the bytes of a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sip.checkpoint import writing
from megatron_sip.checkpoint.manager import SHARDING
from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.engine import Engine
from tests.engine.claims import one_step, start


def kernels_and_bytes(payload: dict[str, Any]) -> dict[str, Any]:
    """How often an optimizer step calls each of torch's operators; what planning a save allocates and holds."""
    context, engine = start(payload)
    one_step(engine, context, 0, payload)  # the first step makes what later ones have
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_step(engine, context, 1, payload)
    return {
        "kernels": {event.key: event.count for event in profile.key_averages()},
        "groups": len(engine._optimizer._inner.param_groups),
        **_bytes_of_a_save(engine, context, Path(payload["directory"])),
    }


def _bytes_of_a_save(engine: Engine, context: ParallelContext, directory: Path) -> dict[str, int]:
    state = engine.sharded_state_dict(metadata=dict(SHARDING))
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(engine)}
    if context.rank == 0:
        directory.mkdir()
    context.barrier()
    with _Allocations() as allocations:
        planned = writing.plan(state, directory, context)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, _, (_, tensors) in planned.buckets
        for _, tensor in tensors
    }
    return {
        "allocated": allocations.num_bytes,
        "held": sum(size for pointer, size in held.items() if pointer not in own),
    }


def _tensors(engine: Engine) -> list[torch.Tensor]:
    weights = [parameter.data for chunk in engine.chunks for parameter in chunk.parameters()]
    inner = engine._optimizer._inner
    main = [parameter.data for group in inner.param_groups for parameter in group["params"]]
    moments = [leaf for leaf in tree_leaves(dict(inner.state)) if isinstance(leaf, torch.Tensor)]
    return weights + main + moments


class _Allocations(TorchDispatchMode):
    """Sums the bytes of every new storage that an operator returns: never less than the peak of what lives at once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.num_bytes += tensor.untyped_storage().nbytes()
        return result
