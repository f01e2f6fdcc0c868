"""Capture and replay as a GPU does it, on CPU: what Python decides is decided once, tensors stay in their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for a value"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class CaptureByReplay:
    """A ``Capture`` that counts what it is asked for."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def __call__(self, function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.num_captures += 1
        recorder = _Recorder()
        is_first = True

        def call() -> None:
            nonlocal is_first
            if is_first:  # a GPU would only have traced by now; here tracing is running
                is_first = False
                with recorder:
                    function()
                return
            self.num_replays += 1
            for func, args, kwargs, result in recorder.calls:
                _repeat(func, args, kwargs, result)

        return call


def _repeat(func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
    inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    again = func(*args, **kwargs)
    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
        if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in inputs:
            old.copy_(new)  # into the memory that later kernels were recorded with
