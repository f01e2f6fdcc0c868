"""A Gloo group of one trainer and the workers of one server, apart from all other groups of either.

Imported on both sides: torch alone.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def address_towards(host: str, port: int) -> str:
    """This machine's address as ``host`` sees it. Nothing is sent. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def open_store(host: str, port: int, is_master: bool, timeout_s: float) -> dist.TCPStore:
    """Where the members of a group find each other; the trainer is its master, with port 0 for a free one."""
    return dist.TCPStore(
        host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )


class GlooGroup:
    """Member ``rank`` of ``world_size``; 0 sends. The constructor waits for the others.

    Raises (also ``broadcast``):
        RuntimeError: a member is lost, or did not come within ``timeout_s``.
    """

    def __init__(self, store: dist.Store, address: str, rank: int, world_size: int, timeout_s: float) -> None:
        """``address``: of this machine, as the other members see it."""
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs know little of it
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [gloo.create_device(hostname=address)]
        options._threads = 1
        self._store = store
        self._group: Any = gloo(store, rank, world_size, options)
        # The first operation connects all with all; what fails, fails here.
        self._group.barrier(dist.BarrierOptions()).wait()

    def broadcast(self, chunk: torch.Tensor) -> dist.Work:
        """Starts to send from rank 0, or to receive into ``chunk`` elsewhere."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        work: dist.Work = self._group.broadcast([chunk], options)
        return work
