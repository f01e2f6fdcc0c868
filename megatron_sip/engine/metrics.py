"""Sums of an objective's metrics over micro-batches, passes and replicas; maxima of those named ``..._max``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.passes import Metrics
from megatron_sip.types import RowBatch

_MAXIMUM = "_max"


class MetricSums:
    """Name -> (sum, count), kept on the device until they are asked for."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._sums: dict[str, torch.Tensor] = {}

    def clear(self) -> None:
        """Starts anew."""
        self._sums = {}

    def add(self, micro_batches: Sequence[Metrics]) -> Metrics:
        """Adds what one pass returned; returns that pass's own sums."""
        own: dict[str, torch.Tensor] = {}
        for metrics in micro_batches:
            for name, (total, count) in metrics.items():
                both = torch.stack([total.double(), count.double()])
                own[name] = _joined(name, own[name], both) if name in own else both
        for name, both in own.items():
            self._sums[name] = _joined(name, self._sums[name], both) if name in self._sums else both
        return {name: (both[0], both[1]) for name, both in own.items()}

    def collect(self) -> dict[str, tuple[float, float]]:
        """Sums over the replicas, on every rank. All replicas must have run the same passes."""
        context = self._context
        result: dict[str, tuple[float, float]] = {}
        if context.is_last_stage:
            names = sorted(self._sums)
            values = torch.stack([self._sums[name] for name in names]).tolist() if names else []
            flat = {f"{part}:{n}": v[part] for n, v in zip(names, values, strict=True) for part in (0, 1)}
            sums = context.sum_over_data_parallel(flat)
            result = {name: (sums[f"0:{name}"], sums[f"1:{name}"]) for name in names}
            maxima = {name: tuple(v) for name, v in zip(names, values, strict=True) if name.endswith(_MAXIMUM)}
            if maxima:
                of_all = context.gather_over_data_parallel(maxima)
                result |= {name: (max(m[name][0] for m in of_all), max(m[name][1] for m in of_all)) for name in maxima}
        return context.broadcast_from_last_stage(result)


def padding(name: str, batch: RowBatch, device: torch.device) -> Metrics:
    """``padding/<name>``: tokens of a micro-batch that are padding or stand in rows that teach nothing, of all."""
    total = float(batch.tokens.numel())
    padded = total - float(batch.num_real_tokens())
    # Filled there: a copy would make the host wait for all that the device has queued.
    return {f"padding/{name}": (torch.full((), padded, device=device), torch.full((), total, device=device))}


def _joined(name: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.maximum(first, second) if name.endswith(_MAXIMUM) else first + second
