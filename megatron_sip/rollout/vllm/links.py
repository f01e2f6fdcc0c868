"""The trainer's ends of the groups over which servers receive weights, by Gloo or by NCCL."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_sip.rollout.vllm.gloo_group import GlooGroup, address_towards, open_store
from megatron_sip.rollout.vllm.nccl_group import NcclGroup, NcclLibrary
from megatron_sip.rollout.vllm.packing import CHUNK_BYTES

_JOIN_S = 60.0
"""Until trainer and workers must have found each other."""


class Sending(Protocol):
    """A chunk that is under way; holds its memory."""

    def done(self) -> bool:
        """Raises RuntimeError if a receiver is lost."""
        ...


class Group(Protocol):
    """The trainer, which sends, and the workers of one server."""

    def send(self, chunk: torch.Tensor) -> Sending:
        """``chunk``: uint8, on the device of the link."""
        ...

    def abort(self) -> None:
        """Gives up what is under way."""
        ...


@dataclass(frozen=True)
class Invitation:
    """To join a group: what the server is told, and what waits for it."""

    init_info: dict[str, Any]
    open: Callable[[], Group]
    """Blocks until all have joined. Raises RuntimeError."""


class Link(Protocol):
    """A way to move tensors."""

    device: torch.device
    """Where a chunk must be."""
    keeps_old_weights: bool
    """Whether a server whose transfer broke off still has its old weights, whole."""

    def invite(self, url: str, world_size: int) -> Invitation:
        """Raises OSError or RuntimeError: this machine lacks what it takes."""
        ...


class GlooLink:
    """To servers with ``gloo_worker.py``."""

    device = torch.device("cpu")
    keeps_old_weights = True

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def invite(self, url: str, world_size: int) -> Invitation:
        parts = urlsplit(url)
        address = address_towards(parts.hostname or "", parts.port or 80)
        store = open_store(address, 0, True, self._timeout_s)
        info = {"master_address": address, "master_port": store.port, "rank_offset": 1, "world_size": world_size}
        info |= {"timeout_s": self._timeout_s, "chunk_bytes": CHUNK_BYTES}
        return Invitation(
            info, lambda: _GlooEnd(GlooGroup(store, address, 0, world_size, min(_JOIN_S, self._timeout_s)))
        )


class _GlooEnd:
    def __init__(self, group: GlooGroup) -> None:
        self._group = group

    def send(self, chunk: torch.Tensor) -> Sending:
        return _GlooSending(self._group.broadcast(chunk), chunk)

    def abort(self) -> None:
        """Gloo ends by itself, by its time-out."""


@dataclass
class _GlooSending:
    work: dist.Work
    chunk: torch.Tensor

    def done(self) -> bool:
        if not self.work.is_completed():
            return False
        self.work.wait()
        return True


class NcclLink:
    """To servers on GPUs, whose NCCL engine is vLLM's own (``nccl_engine.py`` of 0.32).

    They are invited by an NCCL id, which needs neither vLLM's classes here nor a port of ours.
    """

    keeps_old_weights = False

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.device = device
        self._timeout_s = timeout_s

    def invite(self, url: str, world_size: int) -> Invitation:
        library = NcclLibrary()
        unique_id = library.new_id()
        limit = min(_JOIN_S, self._timeout_s)
        return Invitation(
            nccl_init_info(unique_id, world_size),
            lambda: NcclGroup(library, unique_id, world_size, self.device, limit),
        )


def nccl_init_info(unique_id: bytes, world_size: int) -> dict[str, Any]:
    """Fields of vLLM's ``NCCLWeightTransferInitInfo``."""
    return {
        "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
        "rank_offset": 1,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": CHUNK_BYTES,
        "packed_num_buffers": 2,
    }


def link_of(transfer: str, device: torch.device, timeout_s: float) -> Link:
    """``transfer``: value of --rollout-weight-transfer other than files."""
    return NcclLink(device, timeout_s) if transfer == "nccl" else GlooLink(timeout_s)
