"""The device layer: the one place of the package that calls ``torch.cuda``."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch


def select_device(local_rank: int) -> torch.device:
    """The device of this rank: CUDA device ``local_rank`` of the node, or the CPU where there is no CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def communication_backend(device: torch.device) -> str:
    """Name of the torch.distributed backend that moves this device's tensors."""
    return "nccl" if device.type == "cuda" else "gloo"


def synchronize(device: torch.device) -> None:
    """Waits until everything queued on the device has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_cached_memory(device: torch.device) -> None:
    """Gives unused blocks of the allocator back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class SideStream:
    """A stream of its own on a CUDA device, for work that must not hold up the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def handle(self) -> int:
        """``cudaStream_t``, for libraries that are called directly."""
        return int(self._stream.cuda_stream)

    def follow_current(self) -> None:
        """What is queued here from now on waits for what is queued on the current stream by now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def mark(self) -> torch.Event:
        """An event whose ``query`` tells whether all that is queued here by now has run."""
        event: torch.Event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def on_device(self) -> AbstractContextManager[None]:
        """Makes the device the current one of this thread."""
        return cast("AbstractContextManager[None]", torch.cuda.device(self._device))


def pin(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor in page-locked memory, from which copies to ``device`` run in the background; on CPU itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``function`` as a call that repeats its kernels on the same memory, without launching them one by one.

    On CUDA a graph (torch.cuda.CUDAGraph): ``function`` is traced now, not run; whatever it reads and writes outside
    must be tensors that stay where they are, and nothing in it may wait for the device. On CPU ``function`` itself.
    """
    if device.type != "cuda":
        return function
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events from its own thread, which a capture of the whole process would not survive.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory under Megatron's TensorBoard names, in bytes (``mem-allocated-count``: in blocks).

    On CPU only the largest resident size of the process is known, as ``mem-max-allocated-bytes``.
    """
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return {
            "mem-reserved-bytes": float(stats["reserved_bytes.all.current"]),
            "mem-allocated-bytes": float(stats["allocated_bytes.all.current"]),
            "mem-max-allocated-bytes": float(stats["allocated_bytes.all.peak"]),
            "mem-allocated-count": float(stats["allocation.all.current"]),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return {"mem-max-allocated-bytes": float(peak if sys.platform == "darwin" else peak * 1024)}


def device_memory_bytes(device: torch.device) -> int | None:
    """Memory of the device in bytes, or None on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None
