"""The sender of an NCCL group whose other members are vLLM's workers: a few calls of the library that torch has loaded.

torch's own NCCL groups cannot be joined by an id that was made elsewhere. Written against NCCL 2's C interface and
``pynccl.py`` of vLLM 0.32: after the start every member adds up one number, then rank 0 broadcasts.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from megatron_sip.distributed.device import SideStream

_UINT8, _FLOAT32, _SUM = 1, 7, 0
_SUCCESS, _IN_PROGRESS = 0, 7


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


class NcclLibrary:
    """``libnccl.so.2``; every call raises RuntimeError with NCCL's words where it fails."""

    def __init__(self, library: Any = None) -> None:
        """``library``: another one than that of torch. Raises OSError: there is none."""
        self._library = ctypes.CDLL("libnccl.so.2") if library is None else library
        self._library.ncclGetErrorString.restype = ctypes.c_char_p

    def new_id(self) -> bytes:
        """128 bytes that name a group."""
        unique_id = _UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(unique_id))
        return bytes(unique_id)

    def join(self, unique_id: bytes, world_size: int) -> ctypes.c_void_p:
        """A communicator as rank 0. Blocks until all have joined."""
        communicator = ctypes.c_void_p()
        name = _UniqueId.from_buffer_copy(unique_id)
        self._call("ncclCommInitRank", ctypes.byref(communicator), ctypes.c_int(world_size), name, ctypes.c_int(0))
        return communicator

    def add_up(self, number: torch.Tensor, communicator: ctypes.c_void_p, stream: int) -> None:
        """float32 [1], in place."""
        where = ctypes.c_void_p(number.data_ptr())
        kind = (ctypes.c_int(_FLOAT32), ctypes.c_int(_SUM))
        self._call("ncclAllReduce", where, where, ctypes.c_size_t(1), *kind, communicator, ctypes.c_void_p(stream))

    def broadcast(self, chunk: torch.Tensor, communicator: ctypes.c_void_p, stream: int) -> None:
        """uint8 [n], from rank 0."""
        where = ctypes.c_void_p(chunk.data_ptr())
        size = ctypes.c_size_t(chunk.numel())
        kind = (ctypes.c_int(_UINT8), ctypes.c_int(0))
        self._call("ncclBroadcast", where, where, size, *kind, communicator, ctypes.c_void_p(stream))

    def check(self, communicator: ctypes.c_void_p) -> None:
        """Raises RuntimeError if the group has failed since."""
        found = ctypes.c_int(0)
        self._call("ncclCommGetAsyncError", communicator, ctypes.byref(found))
        if found.value not in (_SUCCESS, _IN_PROGRESS):
            raise RuntimeError(f"NCCL: {self._words(found.value)}")

    def abort(self, communicator: ctypes.c_void_p) -> None:
        """Ends what is under way, on the device too."""
        self._call("ncclCommAbort", communicator)

    def _call(self, name: str, *arguments: Any) -> None:
        status = int(getattr(self._library, name)(*arguments))
        if status != _SUCCESS:
            raise RuntimeError(f"{name}: {self._words(status)}")

    def _words(self, status: int) -> str:
        text = self._library.ncclGetErrorString(ctypes.c_int(status))
        return text.decode() if isinstance(text, bytes) else f"status {status}"


class NcclGroup:
    """Rank 0 of a group. The constructor waits for the others. Raises RuntimeError: they did not come."""

    def __init__(
        self, library: NcclLibrary, unique_id: bytes, world_size: int, device: torch.device, timeout_s: float
    ) -> None:
        self._library = library
        self._stream = SideStream(device)
        self._communicator = _within(timeout_s, lambda: library.join(unique_id, world_size), self._stream)
        number = torch.zeros(1, dtype=torch.float32, device=device)
        self._stream.follow_current()
        library.add_up(number, self._communicator, self._stream.handle)

    def send(self, chunk: torch.Tensor) -> NcclSending:
        """``chunk``: uint8, on the group's device."""
        self._stream.follow_current()
        self._library.broadcast(chunk, self._communicator, self._stream.handle)
        return NcclSending(self._library, self._communicator, chunk, self._stream.mark())

    def abort(self) -> None:
        self._library.abort(self._communicator)


class NcclSending:
    """A broadcast on the side stream."""

    def __init__(
        self, library: NcclLibrary, communicator: ctypes.c_void_p, chunk: torch.Tensor, mark: torch.Event
    ) -> None:
        self._library, self._communicator = library, communicator
        self._chunk, self._mark = chunk, mark

    def done(self) -> bool:
        """Whether the chunk has left. Raises RuntimeError."""
        if self._mark.query():
            return True
        self._library.check(self._communicator)
        return False


def _within(timeout_s: float, join: Any, stream: SideStream) -> ctypes.c_void_p:
    """NCCL waits for ever for a member that does not come: in a thread, which is left behind then."""
    results: list[ctypes.c_void_p | RuntimeError] = []

    def run() -> None:
        try:
            with stream.on_device():
                results.append(join())
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=run, name="nccl-join", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not results:
        raise RuntimeError(f"NCCL: the server's workers did not join within {timeout_s:g} s")
    found = results[0]
    if isinstance(found, RuntimeError):
        raise found
    return found
