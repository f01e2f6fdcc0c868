"""Runs a function on several ranks of one job, on this machine: ``run_ranks(2, "tests.model.claims:logits", payload)``.

Ranks are forked from a server that has torch and Megatron-Core imported already, which saves about 3.5 s of CPU per
rank. Every launch is a new set of processes: nothing is left over from one to the next.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from torch._C._distributed_c10d import TCPStore

PRELOADED = ("torch", "megatron.core.models.gpt", "megatron.core.distributed", "megatron.core.optimizer")


_PR_SET_PDEATHSIG = 1


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


def run_ranks(world_size: int, target: str, payload: Any = None, timeout_s: float = 120.0) -> list[Any]:
    """Calls ``function(payload)`` of ``"module:function"`` on every rank, under torchrun's environment variables.

    A rank joins its process groups once: joining again after ``shutdown()`` fails over Gloo. Layouts that differ only
    in the model (virtual stages, sequence parallelism) can share a launch with ``dataclasses.replace(context, ...)``.

    Returns what the ranks returned, by rank (it must pickle; tensors are best turned into lists or NumPy arrays).

    Raises:
        RankFailure: with the traceback of the ranks that failed. All ranks are killed first.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the fork server, which starts with the first call
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # The parent holds the store, as torchrun's agent does: no port has to be guessed.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(target, payload, rank, world_size, store.port, sender))
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        return _collect(target, pipes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            assert process.pid is not None
            with suppress(ProcessLookupError):  # it had not yet begun
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()


def _rank_main(target: str, payload: Any, rank: int, world_size: int, port: int, sender: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills what it started
    # ... with all that it started in turn (Megatron-Core's save starts a process that nobody ends), and should the
    # parent be killed itself, the fork server ends, and so does the rank.
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        import torch

        torch.set_num_threads(1)
        module, function = target.split(":")
        sender.send((True, getattr(importlib.import_module(module), function)(payload)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    # The parent kills the rank when all have answered: a rank that leaves first breaks the others' collectives.
    signal.pause()


def _collect(target: str, pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in range(len(pipes)):
                if rank not in results and rank not in failures:
                    failures[rank] = f"no answer within {timeout_s:.0f} s" if not failures else "waited for the others"
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                succeeded, value = pipes[rank].recv()
            except EOFError:
                succeeded, value = False, "the process died without a traceback (killed, or a crash in native code)"
            (results if succeeded else failures)[rank] = value
        if failures:  # the others may hang in a collective: give them a moment for tracebacks of their own
            deadline = min(deadline, time.monotonic() + 2.0)
    if failures:
        text = "\n".join(f"--- rank {rank} of {len(pipes)}:\n{failure}" for rank, failure in sorted(failures.items()))
        raise RankFailure(f"{target} failed\n{text}")
    return [results[rank] for rank in range(len(pipes))]
