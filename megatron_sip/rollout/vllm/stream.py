"""The whole model's tensors on the job's first rank, one at a time, from whatever layout they are trained at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.distributed import ParallelContext
from megatron_sip.rollout.vllm.packing import Entry
from megatron_sip.rollout.vllm.weights import StageWeights


class ModelStream:
    """For the ranks of the first replica. Each stage gathers its tensors over tensor parallelism and sends them on."""

    def __init__(self, weights: StageWeights, context: ParallelContext) -> None:
        """``weights``: of this rank's stage."""
        self._weights = weights
        self._context = context
        self._stages: Sequence[Sequence[Entry]] = ()

    def entries(self) -> list[Entry]:
        """What ``tensors`` yields, stage after stage; the same at every call. Collective over the replica."""
        if not self._stages:
            own = [(name, dtype, shape) for name, (dtype, shape) in self._weights.plan().items()]
            found: list[Any] = [None] * self._context.host.model_parallel.size()
            dist.all_gather_object(found, (self._context.pp_rank, own), group=self._context.host.model_parallel)
            self._stages = [stage for _, stage in sorted(dict(found).items())]
        return [entry for stage in self._stages for entry in stage]

    def tensors(self) -> Iterator[torch.Tensor]:
        """On the leader, to be exhausted while all other ranks of the replica are in ``pass_on``."""
        for stage, entries in enumerate(self._stages):
            if stage == self._context.pp_rank:
                yield from (tensor for _, tensor in self._weights)
                continue
            source = dist.get_global_rank(self._context.pp_group, stage)
            for _, dtype, shape in entries:
                tensor = torch.empty(tuple(shape), dtype=dtype, device=self._context.device)
                dist.recv(tensor, src=source, group=self._context.pp_group)
                yield tensor

    def pass_on(self) -> None:
        """On the other ranks: takes part in the gathers; the first of a later stage's ranks sends."""
        sends = self._context.tp_rank == 0
        for _, tensor in self._weights:
            if sends:
                dist.send(tensor.contiguous(), dst=self._context.leader_rank, group=self._context.pp_group)
