"""Worker processes that may be killed at any moment without leaving their parent waiting.

A pool whose workers share one pipe and its lock cannot tell a worker that died in the middle of its answer from one
that is slow: the others hold the pipe open, and the lock stays taken (``ProcessPoolExecutor`` of CPython 3.11 to 3.13).
Here every worker has a pipe of its own, whose other end only that worker holds: when it dies, however that happens,
the kernel ends the pipe, and the parent's read with it. Workers share nothing else, no lock above all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

_PR_SET_PDEATHSIG = 1
_TASKS_AHEAD = 3
"""Tasks in flight per worker: enough to keep it busy, few enough to keep memory flat."""
_REAP_S = 10.0
Task = TypeVar("Task")
Answer = TypeVar("Answer")


class WorkerLost(Exception):
    """A worker died before its answer. The message says which one and how it ended, and leaves the remedy to say."""


@dataclass(frozen=True)
class _Worker:
    name: str
    process: SpawnProcess
    connection: Connection


class WorkerPool(Generic[Task, Answer]):
    """``num_workers`` processes, each of which calls ``start(*arguments)`` once and then answers tasks with its result.

    Left by an exception, it kills its workers at once. Raises ``WorkerLost``, and what ``start`` raised.
    """

    def __init__(self, num_workers: int, start: Callable[..., Callable[[Task], Answer]], *arguments: Any) -> None:
        context = get_context("spawn")
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers)
        try:
            for number in range(1, num_workers + 1):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, os.getpid(), start, arguments), daemon=True)
                process.start()
                theirs.close()  # the worker's end is the worker's alone
                worker = _Worker(f"worker {number} of {num_workers} (process {process.pid})", process, ours)
                self._workers.append(worker)
                self._idle.put(worker)
            for worker in self._workers:
                self._hear(worker)  # it has started
        except BaseException:
            self._end(kill=True)
            raise

    def __enter__(self) -> WorkerPool[Task, Answer]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(kill=kind is not None)

    def submit(self, task: Task) -> Future[Answer]:
        """Have the next free worker do a task. Raises there what the task raised, or ``WorkerLost``."""
        return self._threads.submit(self._ask, task)

    def map(self, tasks: Iterable[Task]) -> Iterator[Answer]:
        """Answers in the order of the tasks, of which a bounded number is in flight."""
        waiting: deque[Future[Answer]] = deque()
        for task in tasks:
            waiting.append(self.submit(task))
            if len(waiting) > len(self._workers) * _TASKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, task: Task) -> Answer:
        worker = self._idle.get()
        try:
            try:
                worker.connection.send(task)
            except OSError:
                raise self._lost(worker) from None
            answer: Answer = self._hear(worker)
            return answer
        finally:
            self._idle.put(worker)  # a dead one too: the next task shall not wait for it

    def _hear(self, worker: _Worker) -> Any:
        try:
            answer, error = worker.connection.recv()
        except (EOFError, OSError):
            raise self._lost(worker) from None
        if error is not None:
            raise error
        return answer

    def _lost(self, worker: _Worker) -> WorkerLost:
        worker.process.join(_REAP_S)
        code = worker.process.exitcode
        if code is None:
            how = "closed its pipe"
        elif code >= 0:
            how = f"ended with exit code {code}"
        else:
            how = f"was killed by {signal.Signals(-code).name}"
        return WorkerLost(f"{worker.name} {how}{', as when memory runs out' if code == -signal.SIGKILL else ''}")

    def _end(self, kill: bool) -> None:
        if kill:
            for worker in self._workers:
                worker.process.kill()
        self._threads.shutdown(cancel_futures=True)  # threads that wait for a killed worker read its end
        for worker in self._workers:
            worker.connection.close()  # tells an idle worker to end
        for worker in self._workers:
            worker.process.join()


def _serve(
    connection: Connection, parent: int, start: Callable[..., Callable[[Task], Answer]], arguments: tuple[Any, ...]
) -> None:
    _enter(parent)
    try:
        act = start(*arguments)
    except Exception as error:
        _send(connection, None, error)
        return
    _send(connection, None, None)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = act(task)
        except Exception as error:
            _send(connection, None, error)
        else:
            _send(connection, answer, None)


def _send(connection: Connection, answer: object, error: Exception | None) -> None:
    if error is not None:
        error.add_note(f"in a worker:\n{''.join(traceback.format_exception(error))}")
    connection.send((answer, error))


def _enter(parent: int) -> None:
    """Tie this worker to its parent, and to one core.

    A time limit or Ctrl-C signals all processes of a run: the parent alone ends it. A worker left behind by a killed
    parent would write on beside a repeated run. Workers are counted to fit the cores: a library that starts threads of
    its own would have them fight.
    """
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
