"""vLLM's side of the Gloo transfer: an engine of its weight-transfer interface (vLLM 0.32), for servers on CPU.

Imported by the workers of a server that was started with ``--worker-extension-cls
megatron_sip.rollout.vllm.gloo_worker.GlooTransfer --weight-transfer-config '{"backend": "gloo"}'`` and this package in
its PYTHONPATH; vLLM's environment needs nothing else of it. vLLM's own engines move tensors of GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_sip.rollout.vllm.gloo_group import GlooGroup, address_towards, open_store
from megatron_sip.rollout.vllm.packing import Entry, cut, num_bytes, unpacked

_DAMAGED = "an earlier update broke off while weights were loaded: restart the server"


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer waits, and how it cuts the stream."""

    master_address: str
    master_port: int
    rank_offset: int
    """Members before the first worker: the trainer."""
    world_size: int
    """The trainer and all workers of this server."""
    timeout_s: float
    chunk_bytes: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of the stream, in its order: fields as of vLLM's NCCL engine."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @property
    def entries(self) -> list[Entry]:
        types = [getattr(torch, name) for name in self.dtype_names]
        return list(zip(self.names, types, self.shapes, strict=True))


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives all weights before it loads the first: a transfer that breaks off leaves the old ones whole."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._group: GlooGroup | None = None
        self._chunk_bytes = 0
        self._is_damaged = False
        """Whether loading began and did not end."""
        self._is_loaded = False
        """Whether weights wait for the end of their update."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the trainer's group, in place of one that was joined before."""
        self._group = None
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = open_store(init_info.master_address, init_info.master_port, False, init_info.timeout_s)
        address = address_towards(init_info.master_address, init_info.master_port)
        self._group = GlooGroup(
            store, address, worker + init_info.rank_offset, init_info.world_size, init_info.timeout_s
        )
        self._chunk_bytes = init_info.chunk_bytes

    def start_weight_update(self) -> None:
        if self._is_damaged:
            raise RuntimeError(_DAMAGED)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base does, without waiting for an accelerator, which is not there."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Raises RuntimeError: the trainer is lost, or what it sends is not this model."""
        if self._group is None:
            raise RuntimeError("no trainer has joined: call /init_weight_transfer_engine first")
        chunks = []
        for entries in cut(update_info.entries, self._chunk_bytes):
            chunk = torch.empty(sum(num_bytes(dtype, shape) for _, dtype, shape in entries), dtype=torch.uint8)
            try:
                self._group.broadcast(chunk).wait()
            except RuntimeError:
                self._group = None
                raise
            chunks.append((chunk, entries))
        wanted = {name for name, _ in self.model.named_parameters()}
        self._is_damaged = True
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(pair for chunk, entries in chunks for pair in unpacked(chunk, entries))
        if loaded is not None and wanted - loaded:
            missing = sorted(wanted - loaded)
            raise RuntimeError(f"the trainer's model lacks {len(missing)} parameters of the server's, as {missing[0]}")
        self._is_loaded = True

    def finish_weight_update(self) -> None:
        """Also ends an update that was begun and got no weights."""
        if self._is_loaded:
            self._is_loaded = False
            finalize_layerwise_reload(self.model, self.model_config)
            self._is_damaged = False
        elif self._is_damaged:
            raise RuntimeError(_DAMAGED)

    def shutdown(self) -> None:
        self._group = None


class GlooTransfer:
    """A worker extension without methods: to name it is to import this module."""


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
