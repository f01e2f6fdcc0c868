"""The CPU platform: stand-ins for the CUDA functions that Megatron-Core calls, so that it runs over Gloo on CPU.

Installed once, and only where there is no CUDA device. ``torch.cuda.is_available()`` stays False.
Tried with megatron-core 0.16.1 and 0.19.2; the reason for every stand-in is beside it.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_sip.library_warnings import hide_cuda_advice

CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def install_cpu_platform() -> bool:
    """Makes Megatron-Core run on CPU in this thread; does nothing with CUDA or the second time.

    Returns:
        Whether the stand-ins are in place after the call.
    """
    if torch.cuda.is_available():
        return False
    if is_installed():
        return True
    hide_cuda_advice()
    # In this order: megatron.core imports torch.compile's tables, which list the CUDA functions as they are by then.
    _replace_random_state_functions()
    _replace_cuda_functions()
    _replace_linear_layers()
    _keep_freed_memory()
    _skip_collectives_of_one_rank()
    # Never left again: Megatron's layers ask for device="cuda" for as long as the process lives.
    _CudaArgumentsOnCpu().__enter__()
    return True


def is_installed() -> bool:
    """Whether the stand-ins are in place."""
    current_device: object = torch.cuda.current_device
    return current_device is _current_device


class _CudaArgumentsOnCpu(TorchFunctionMode):
    """Sends tensors that are asked for on "cuda" to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer sorts parameters by this name ("torch.cuda.FloatTensor").
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if "device" in kwargs and (_names_cuda(kwargs["device"]) or isinstance(kwargs["device"], int)):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _NoStream:
    """A stream on a device that runs everything in order: nothing is ever to be waited for."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def record(self, stream: object = None) -> None:
        """Nothing to mark."""

    def record_event(self, event: object = None) -> object:
        """Nothing to mark."""
        return event if event is not None else _NoStream()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything queued has run."""
        return True

    def elapsed_time(self, end: object) -> float:
        """Milliseconds; events carry no time here."""
        return 0.0


class _NoEvent(_NoStream):
    """An event on such a stream."""


def _current_device() -> torch.device:
    return CPU


def _current_stream(device: object = None) -> _NoStream:
    return _NoStream()


def _default_stream(device: object = None) -> _NoStream:
    return _NoStream()


def _stream_context(stream: object) -> AbstractContextManager[None]:
    return nullcontext()


def _new_no_op() -> Callable[..., None]:
    # One function per name: torch.compile's tables refuse one object under two names.
    def do_nothing(*args: object, **kwargs: object) -> None:
        return None

    return do_nothing


def _false() -> bool:
    return False


def _get_random_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _replace_cuda_functions() -> None:
    stand_ins: dict[str, Any] = {
        "current_device": _current_device,
        "set_device": _new_no_op(),
        "synchronize": _new_no_op(),
        "Stream": _NoStream,
        "Event": _NoEvent,
        "current_stream": _current_stream,
        "default_stream": _default_stream,
        "set_stream": _new_no_op(),
        "stream": _stream_context,
        # A CUDA build of torch without a GPU raises here; 0.19 asks before it checks for inference.
        "is_current_stream_capturing": _false,
        "get_rng_state": _get_random_state,
        "set_rng_state": _set_random_state,
        "manual_seed": _manual_seed,
        # torch.manual_seed calls it after it has seeded the CPU's generator.
        "manual_seed_all": _new_no_op(),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, stand_ins[name])


def _replace_linear_layers() -> None:
    # Megatron's multiplies through torch.matmul: MKL in float32, which is slow on AMD processors.
    from megatron.core.tensor_parallel import layers

    from megatron_sip.distributed.cpu_linear import linear_for_megatron, look_up

    layers.linear_with_grad_accumulation_and_async_allreduce = linear_for_megatron
    layers.F = SimpleNamespace(embedding=look_up)  # all that its module takes of torch.nn.functional


def _keep_freed_memory() -> None:
    # glibc gives freed memory at the heap's end back to the system, and takes it anew, page by page, in the next layer
    # and the next step: about 0.1 s of a step of 1.5 s. Blocks of 32 MiB and more still go back at once.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _skip_collectives_of_one_rank() -> None:
    # NCCL does nothing where one rank reduces a buffer into a view of itself; Gloo copies it there and back.
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is not None and group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return call


def _replace_random_state_functions() -> None:
    # Its setter queues the change until CUDA starts (torch.cuda._lazy_call), which is never.
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = _get_random_state
    megatron_random._set_cuda_rng_state = _set_random_state
    # The "CUDA" generator is the CPU's here, so this warning would come at every fork.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )
