"""The reference policy of DPO and GRPO: a second set of weights for the same chunks, swapped in to score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_sip.objectives import ReferenceOptions


class ReferencePolicy:
    """Frozen at the start, copied from the policy every M steps, or a moving average of it.

    Memory per rank beside the policy's: on the device one more copy of the weights and no copying to score; on the host
    two copies in pinned memory (the reference, and the policy while it is swapped out) and nothing on the device. A
    moving average is kept in float32, as bfloat16 would round its small changes away.
    """

    def __init__(self, config: ReferenceOptions, chunks: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._config = config
        self._chunks = list(chunks)
        self._parameters = [parameter for chunk in self._chunks for parameter in chunk.parameters()]
        self._on_host = config.reference_placement == "host"
        self._pinned = self._on_host and device.type == "cuda"
        is_average = config.reference_policy == "ema"
        self._weights = [self._empty(p, torch.float32 if is_average else p.dtype) for p in self._parameters]
        self._outside = [self._empty(p, p.dtype) for p in self._parameters] if self._on_host else []
        self.version = 0
        """Optimizer steps behind the weights (of the latest ones in it, for a moving average)."""
        self.capture(version=0)

    def _empty(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        device = torch.device("cpu") if self._on_host else parameter.device
        return torch.empty(parameter.shape, dtype=dtype, device=device, pin_memory=self._pinned)

    @torch.no_grad()
    def capture(self, version: int) -> None:
        """Makes the policy's present weights the reference."""
        for weight, parameter in zip(self._weights, self._parameters, strict=True):
            weight.copy_(parameter)
        self.version = version

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Follows the policy after its optimizer step number ``num_updates`` (from 1)."""
        if self._config.reference_policy == "synced" and num_updates % self._config.reference_sync_interval == 0:
            self.capture(num_updates)
        elif self._config.reference_policy == "ema":
            for weight, parameter in zip(self._weights, self._parameters, strict=True):
                policy = parameter.detach().to(device=weight.device, dtype=torch.float32)
                weight.lerp_(policy, 1.0 - self._config.reference_ema_decay)
            self.version = num_updates

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the chunks compute with the reference's weights. For forward passes only."""
        policy = [parameter.data for parameter in self._parameters]
        for kept, data in zip(self._outside, policy, strict=self._on_host):
            kept.copy_(data, non_blocking=self._pinned)
        try:
            for weight, parameter in zip(self._weights, self._parameters, strict=True):
                if self._on_host:
                    parameter.data.copy_(weight, non_blocking=self._pinned)
                else:
                    parameter.data = weight.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self._parameters, policy, strict=True):
                parameter.data = data
            for kept, data in zip(self._outside, policy, strict=self._on_host):
                data.copy_(kept, non_blocking=self._pinned)

    def sharded_state_dict(self, model_state: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The chunks' sharded state with the reference's tensors, under keys that begin with ``reference.``."""
        weights = {id(p): weight for p, weight in zip(self._parameters, self._weights, strict=True)}
        state: dict[str, Any] = {}
        for number, chunk_state in enumerate(model_state):
            entries = {}
            for name, entry in chunk_state.items():
                if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and id(entry.data) in weights:
                    entries[name] = _with_data(entry, weights[id(entry.data)])
            state[f"chunk{number}"] = entries
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what ``dist_checkpointing`` loaded for ``sharded_state_dict``."""
        weights = {id(p): weight for p, weight in zip(self._parameters, self._weights, strict=True)}
        for number, chunk in enumerate(self._chunks):
            for name, parameter in chunk.named_parameters():
                weights[id(parameter)].copy_(state[f"chunk{number}"][name])


def _with_data(entry: Any, data: torch.Tensor) -> Any:
    changes: dict[str, Any] = {"key": f"reference.{entry.key}", "data": data}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(entry, **changes)
