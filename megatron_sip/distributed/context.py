"""A rank's place in the job, and the few collectives on host objects that the package needs.

Every collective names its group. Host objects and counters travel over Gloo groups, also on CUDA, so that they neither
wait for the device nor touch its memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_sip.distributed.config import ParallelConfig
from megatron_sip.distributed.device import communication_backend, select_device
from megatron_sip.distributed.platform import install_cpu_platform

T = TypeVar("T")


@dataclass(frozen=True)
class HostGroups:
    """Gloo groups for Python objects and float64 counters."""

    world: dist.ProcessGroup
    data_parallel: dist.ProcessGroup
    model_parallel: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands, and its process groups."""

    config: ParallelConfig
    seed: int
    """The run's seed, from which initial weights are drawn."""
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_parallel_group: dist.ProcessGroup
    host: HostGroups

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer and computes losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_leader(self) -> bool:
        """The one rank of a replica that talks to the teacher and builds candidates: TP 0 of the first stage."""
        return self.is_first_stage and self.tp_rank == 0

    @property
    def leader_rank(self) -> int:
        """Global rank of this replica's leader."""
        return self._replica_ranks[0]

    @property
    def last_stage_rank(self) -> int:
        """Global rank of TP 0 of this replica's last stage."""
        return self._replica_ranks[self.tp_size * (self.pp_size - 1)]

    @property
    def _replica_ranks(self) -> list[int]:
        # Order tp-dp-pp: within a replica the ranks ascend by stage, then by TP rank.
        return sorted(dist.get_process_group_ranks(self.host.model_parallel))

    def broadcast_object(self, obj: T | None) -> T:
        """The leader's ``obj`` on all ranks of its replica; what the others pass is ignored."""
        return self._broadcast(obj, self.leader_rank, self.host.model_parallel)

    def broadcast_from_last_stage(self, obj: T | None) -> T:
        """``obj`` of TP 0 of the last stage on all ranks of its replica; what the others pass is ignored."""
        return self._broadcast(obj, self.last_stage_rank, self.host.model_parallel)

    def broadcast_from_rank_zero(self, obj: T | None) -> T:
        """``obj`` of global rank 0 on all ranks of the job; what the others pass is ignored."""
        return self._broadcast(obj, 0, self.host.world)

    def gather_over_data_parallel(self, obj: T) -> list[T]:
        """``obj`` of every replica's rank in this rank's place, in the order of ``dp_rank``."""
        if self.dp_size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.dp_size
        dist.all_gather_object(gathered, obj, group=self.host.data_parallel)
        return gathered

    def sum_over_data_parallel(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums in float64 over the replicas; every rank of the group passes the same keys."""
        names = sorted(values)
        sums = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        if self.dp_size > 1:
            dist.all_reduce(sums, group=self.host.data_parallel)
        return dict(zip(names, sums.tolist(), strict=True))

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank of the job."""
        return self.any_rank_each([flag])[0]

    def any_rank_each(self, flags: Sequence[bool]) -> list[bool]:
        """The same of several flags at once."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host.world)
        return [bool(flag) for flag in found.tolist()]

    def barrier(self) -> None:
        """Waits for all ranks of the job."""
        dist.barrier(group=self.host.world)

    def shutdown(self) -> None:
        """Leaves the process groups; the context is of no use after it."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    def _broadcast(self, obj: T | None, source: int, group: dist.ProcessGroup) -> T:
        if group.size() == 1:
            return cast(T, obj)
        box = [obj if self.rank == source else None]
        dist.broadcast_object_list(box, src=source, group=group, device=torch.device("cpu"))
        return cast(T, box[0])


def initialize(config: ParallelConfig, seed: int) -> ParallelContext:
    """Joins the job's process groups and seeds Megatron's generators.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without it this process is
    the whole job, and no port is opened.

    Raises:
        ConfigurationError: the sizes are wrong, or do not divide the world (before any process group starts).
    """
    config.validate()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.data_parallel_size(world_size)
    install_cpu_platform()
    device = select_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    _init_process_group(communication_backend(device), timeout)

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # Virtual stages are a matter of the model: build_model tells Megatron their number.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        create_gloo_process_groups=True,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return _describe(config, seed, device, timeout)


def _init_process_group(backend: str, timeout: timedelta) -> None:
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)


def _describe(config: ParallelConfig, seed: int, device: torch.device, timeout: timedelta) -> ParallelContext:
    from megatron.core import parallel_state as state

    dp_group = state.get_data_parallel_group()
    model_parallel_group = state.get_model_parallel_group()
    return ParallelContext(
        config=config,
        seed=seed,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        pp_size=state.get_pipeline_model_parallel_world_size(),
        dp_rank=state.get_data_parallel_rank(),
        dp_size=state.get_data_parallel_world_size(),
        tp_group=state.get_tensor_model_parallel_group(),
        pp_group=state.get_pipeline_model_parallel_group(),
        dp_group=dp_group,
        model_parallel_group=model_parallel_group,
        host=HostGroups(
            world=_gloo_twin(cast(dist.ProcessGroup, dist.group.WORLD), device, timeout),
            data_parallel=state.get_data_parallel_group_gloo(),
            model_parallel=_gloo_twin(model_parallel_group, device, timeout),
        ),
    )


def _gloo_twin(group: dist.ProcessGroup, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    """A Gloo group of the same ranks: on CPU the group itself."""
    if device.type == "cpu":
        return group
    ranks_of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks_of_all, dist.get_process_group_ranks(group))
    twin: dist.ProcessGroup | None = None
    for ranks in sorted({tuple(ranks) for ranks in ranks_of_all}):  # every rank creates every group, in one order
        created = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            twin = created
    assert twin is not None
    return twin
