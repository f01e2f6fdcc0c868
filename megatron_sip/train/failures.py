"""How a job ends after a failure: one rank says what went wrong, and none is left waiting for another."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_sip.errors import SIPError

_FIRST = "megatron_sip/failed_ranks"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
"""Failures of writing and reading that are the machine's, not the program's."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Read error")
"""What Gloo says when another rank has ended, or no longer answers."""


def say_once_per_node(error: SIPError, patience: float = 30.0) -> None:
    """Prints a failure that every rank meets before the ranks know each other; nodes may differ in what they lack.

    The node's first rank speaks. The others leave it ``patience`` seconds to do so, as torchrun ends all ranks when the
    first has ended, also one that has not spoken yet; a rank that is still alive then has met the failure alone, and
    says so itself.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        time.sleep(patience)
    print(f"error: {error}" + (f" (local rank {rank})" if rank != "0" else ""), file=sys.stderr, flush=True)


@contextmanager
def failures_end_the_job() -> Iterator[None]:
    """Ends this process with status 1 if the block raises, after saying why unless another rank has said so.

    The process leaves at once, without waiting for process groups: other ranks may be in a collective with this one,
    which then fails there, or ends when torchrun stops them.
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave("interrupted twice: leaving without saving" if _is_first() else "", 130)
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, on the loss of another rank: this one leaves anyway
        _leave(_describe(error) if _is_first() else "", 1)


@contextmanager
def signals_end_the_start() -> Iterator[None]:
    """Before training SIGTERM and SIGINT end this process at once, with one line: there is nothing to save.

    ``StopSignals`` takes over with the first step.
    """
    before = {number: signal.signal(number, _leave_on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    says = os.environ.get("LOCAL_RANK", "0") == "0"
    _leave(f"received {name} while no step was running: nothing to save, leaving" if says else "", 128 + number)


def _describe(error: Exception) -> str:
    if isinstance(error, SIPError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"error: {error}: give room or rights there, then resume from the latest checkpoint with --load"
    lost = _loss_of_a_rank(error)
    if lost:
        import torch.distributed as dist

        return (
            f"error: rank {dist.get_rank()} has lost another rank ({lost}): it was killed or the network failed; look "
            "for its last words, then resume from the latest checkpoint with --load"
        )
    return "".join(traceback.format_exception(error)).rstrip()


def _loss_of_a_rank(error: Exception) -> str:
    """What the transport says if it has lost its peer, else nothing."""
    # Torch is imported where it is needed: --help and --dry-run do without.
    import torch.distributed as dist

    text = str(error)
    if isinstance(error, RuntimeError):
        for sign in _LOST:
            if sign in text:
                return sign
    return text.partition("\n")[0][:200] if isinstance(error, dist.DistError) else ""


def _is_first() -> bool:
    """Whether no other rank has failed before. What fails later is mostly a consequence."""
    if "torch.distributed" not in sys.modules:
        return True
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        return True
    try:
        return int(distributed_c10d._get_default_store().add(_FIRST, 1)) == 1
    except RuntimeError:  # the store went down with the rank that held it
        return True


def _leave(message: str, status: int) -> None:
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)
