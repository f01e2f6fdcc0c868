"""Writes one checkpoint in Megatron-Core's ``torch_dist`` format, in three parts: plan, write, finish.

``megatron.core.dist_checkpointing.save`` does the same, but raises on one rank while the others wait in a collective if
a file cannot be written, starts a second Python process for a queue, and hangs if a writer dies. Here a rank's failure
is a value that travels to rank 0 with its results, so that all ranks raise the same error. Only this module knows
Megatron-Core's saving internals; what it writes, Megatron-LM reads.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_sip.checkpoint import layout
from megatron_sip.distributed import ParallelContext, synchronize

COMMON_STATE = "common.pt"
CONTENT_METADATA = "content_metadata"

WriteResults = list[Any]
"""torch's records of what lies where in a rank's file."""


@dataclass(frozen=True)
class WritePlan:
    """What this rank has to write; its tensors are on the host."""

    writer: FileSystemWriterAsync
    buckets: list[Any]
    """One (path, name, (bytes, tensors)) per file."""
    metadata: Any
    """torch's global metadata, on rank 0."""
    error: str = ""
    """What has already failed on this rank."""


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy up to the plan; writing and finishing are ours."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *unused: Any) -> Any:
        return writer, save_state_dict_ret[1]


def plan(sharded_state: dict[str, Any], directory: Path, context: ParallelContext) -> WritePlan:
    """Agrees with all ranks on who writes what, and brings this rank's part to the host. Collective.

    ``sharded_state`` may hold anything beside sharded tensors; rank 0 writes that part at once, so it must be the same
    on all ranks, and made of what ``torch.load(weights_only=True)`` reads.
    """
    sharded, common = save_preprocess(sharded_state)
    error = _write_common(common, directory) if context.rank == 0 else ""
    strategy: Any = _PlanOnly("torch_dist", 1, thread_count=1)
    if context.dp_size > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, context.dp_group)
    # 0.16.1 has one kind of asynchronous writer; 0.19 has two and defaults to one of another package.
    kinds = ("mcore",) if hasattr(filesystem_async, "get_write_results_queue") else ()
    with _no_results_queue():
        writer, metadata = strategy.async_save(sharded, directory, *kinds)
    buckets = [_on_host(bucket) for bucket in writer.write_buckets]
    synchronize(context.device)
    return WritePlan(writer=writer, buckets=buckets, metadata=metadata, error=error)


def write(planned: WritePlan) -> WriteResults:
    """Writes this rank's files and waits until they are on disk. Not collective; safe in a forked process.

    Raises:
        OSError, RuntimeError: a file could not be written.
    """
    results: WriteResults = []
    for index, bucket in enumerate(planned.buckets):
        outcomes: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        busy: queue.Queue[int] = queue.Queue()
        busy.put(index)
        FileSystemWriterAsync.write_preloaded_data(
            [planned.writer.transforms], index, bucket, outcomes, busy, use_fsync=True
        )
        _, outcome = outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        results.extend(outcome)
    return results


def finish(planned: WritePlan, results: list[WriteResults], directory: Path) -> None:
    """On rank 0, after all ranks have written: the index of who wrote what, and the format's name.

    Raises:
        OSError: a file could not be written, or one that another rank wrote cannot be seen here.
    """
    for name in {result.storage_data.relative_path for of_rank in results for result in of_rank}:
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name} was written by another rank and is not visible to rank 0: "
                "--save must lie on a file system that all nodes share"
            )
    planned.writer.finish(planned.metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    layout.sync_file(directory / "metadata.json")


def _write_common(common: dict[str, Any], directory: Path) -> str:
    # Also with 0.19, which would put it into the sharded files: it reads this form too, and 0.16 reads no other.
    path = directory / COMMON_STATE
    buffer = io.BytesIO()
    torch.save(common, buffer)  # not into the file: torch would report a full disk as an "unexpected pos"
    try:
        path.write_bytes(buffer.getbuffer())
        layout.sync_file(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def _on_host(bucket: Any) -> Any:
    path, name, (blobs, tensors) = bucket
    return path, name, (blobs, [(item, _host_copy(tensor)) for item, tensor in tensors])


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    # A forked writer sees the parent's memory as it was, except for memory that is shared.
    if tensor.is_cpu and tensor.is_shared():
        return tensor.clone()
    return tensor.to("cpu", non_blocking=True)


@contextmanager
def _no_results_queue() -> Iterator[None]:
    """Keeps Megatron-Core from starting a process for a queue that is not used here."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = object()
    try:
        yield
    finally:
        filesystem_async._results_queue = before
