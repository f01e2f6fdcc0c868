"""The trainer's side of the teacher process: tickets in, answers out in any order, failures as exceptions."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_sip import errors
from megatron_sip.errors import JudgeError, SIPError
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import JudgeRequest, JudgeResult, RewriteRequest, RewriteResult
from megatron_sip.teacher.messages import Answer, Close, Failure, GetState, Ready, SetState, Start, Submit

_EMBEDDED = "megatron_sip.teacher.build:build_teacher"
_CLOSE_S = 5.0


@dataclass(frozen=True)
class _StateTicket:
    """A ticket of our own, which no caller's can equal."""

    number: int


class TeacherProcess:
    """One per data-parallel replica, on its leader. Use as a context manager, or call ``close``.

    The process is a fresh interpreter: it inherits neither torch nor CUDA nor process groups, and does not import the
    program's main module again. At most ``config.judge_queue`` tickets are out at a time; ``submit`` waits beyond that.
    """

    def __init__(
        self,
        config: TeacherConfig,
        options: Mapping[str, Any] | None = None,
        *,
        factory: str = _EMBEDDED,
        start_timeout_s: float = 120.0,
    ) -> None:
        """Start it and wait until its teacher is built.

        ``options``: further arguments of the factory (``tokenizer_fingerprint``, ``judging``). Raises whatever
        SIPError the factory raises, and JudgeError if the process dies or is not ready in time.
        """
        self._config = config
        self._state_tickets = itertools.count()
        self._changed = threading.Condition()
        self._ready = False
        self._closed = False
        self._failure: SIPError | None = None
        self._pending: set[Hashable] = set()
        self._answers: dict[Hashable, Any] = {}
        self._submitted_s: dict[Hashable, float] = {}
        self._answered_s: dict[Hashable, float] = {}
        self._sending = threading.Lock()
        self._process, self._connection = _spawn()
        self._receiver = threading.Thread(target=self._receive, name="teacher-receiver", daemon=True)
        self._receiver.start()
        try:
            self._send(Start(factory, config, dict(options or {})))
            self._wait(
                lambda: self._ready, start_timeout_s, f"the teacher process is not ready after {start_timeout_s:g} s"
            )
        except SIPError:
            self._process.kill()
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, ticket: Hashable, request: JudgeRequest | RewriteRequest) -> None:
        """Send a request; returns at once unless the queue is full. Raises JudgeError if the process has failed."""
        limit, timeout = self._config.judge_queue, self._config.judge_timeout_s
        self._wait(
            lambda: len(self._pending) < limit,
            timeout,
            f"the teacher has held {limit} unanswered batches for {timeout:g} s: raise judge-timeout-s or judge-queue",
        )
        self._request(ticket, Submit(ticket, request))

    def ready(self, ticket: Hashable) -> bool:
        """Whether ``collect`` would return, or raise, at once."""
        with self._changed:
            self._check_known(ticket)
            return ticket in self._answers or self._failure is not None

    def wait(self, ticket: Hashable, timeout_s: float) -> bool:
        """``ready``, after waiting for it at most ``timeout_s``."""
        with self._changed:
            self._check_known(ticket)
            return self._changed.wait_for(lambda: ticket in self._answers or self._failure is not None, timeout_s)

    def peek(self, ticket: Hashable) -> JudgeResult | RewriteResult | None:
        """The answer if it is there, no failure, and not collected yet; the ticket stays to be collected."""
        with self._changed:
            answer = self._answers.get(ticket)
        return answer if isinstance(answer, JudgeResult | RewriteResult) else None

    def duration_s(self, ticket: Hashable) -> float:
        """Seconds from a ticket's submission to its answer, which has come and is not collected yet."""
        with self._changed:
            return self._answered_s[ticket] - self._submitted_s[ticket]

    @property
    def num_out(self) -> int:
        """Tickets without an answer."""
        with self._changed:
            return len(self._pending)

    def collect(self, ticket: Hashable, timeout_s: float | None = None) -> JudgeResult | RewriteResult:
        """Wait for a ticket's answer and hand it over, once.

        ``timeout_s``: None takes judge-timeout-s; after a time-out the ticket is still out. Raises JudgeError after a
        time-out, or with the process's traceback if it failed.
        """
        answer = self._collect(ticket, timeout_s)
        assert isinstance(answer, JudgeResult | RewriteResult)
        return answer

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of the judges, after everything submitted so far."""
        ticket = _StateTicket(next(self._state_tickets))
        self._request(ticket, GetState(ticket))
        return dict(self._collect(ticket, None))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put running statistics back; what is submitted afterwards is judged with them."""
        ticket = _StateTicket(next(self._state_tickets))
        self._request(ticket, SetState(ticket, state))
        self._collect(ticket, None)

    def close(self) -> None:
        """End the process; unanswered requests are lost. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._process.poll() is None:
            # It may die between these two lines: then the goal is reached.
            with contextlib.suppress(JudgeError):
                self._send(Close())
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._receiver.join()
        self._connection.close()

    def __enter__(self) -> TeacherProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, ticket: Hashable, message: Any) -> None:
        with self._changed:
            self._raise_failure()
            if ticket in self._pending or ticket in self._answers:
                raise ValueError(f"ticket {ticket!r} is already out")
            self._pending.add(ticket)
            self._submitted_s[ticket] = time.perf_counter()
        self._send(message)

    def _collect(self, ticket: Hashable, timeout_s: float | None) -> Any:
        timeout = self._config.judge_timeout_s if timeout_s is None else timeout_s
        with self._changed:
            self._check_known(ticket)
        message = (
            f"ticket {ticket!r} has no answer after {timeout:g} s: the judge is slow or stuck; raise judge-timeout-s"
        )
        # An answer that came before the process died is still good.
        self._wait(lambda: ticket in self._answers, timeout, message)
        with self._changed:
            answer = self._answers.pop(ticket)
            del self._submitted_s[ticket], self._answered_s[ticket]
        if isinstance(answer, Failure):
            raise _exception(answer, f"ticket {ticket!r} failed in the teacher process")
        return answer

    def _check_known(self, ticket: Hashable) -> None:
        if ticket not in self._pending and ticket not in self._answers:
            raise ValueError(f"ticket {ticket!r} was never submitted, or is collected already")

    def _wait(self, condition: Any, timeout_s: float, message: str) -> None:
        """Until the condition holds; raises JudgeError when time is up or the process has failed."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._failure is not None, timeout_s)
            if condition():
                return
            self._raise_failure()
        raise JudgeError(message)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            # A new exception each time: a raised one collects tracebacks.
            raise type(self._failure)(*self._failure.args)

    def _send(self, message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except (OSError, ValueError) as error:
            # The receiver knows more (a traceback, an exit status) as soon as it has seen the end of the socket.
            self._receiver.join(_CLOSE_S)
            with self._changed:
                self._raise_failure()
            raise JudgeError(f"the teacher process cannot be reached: {error}") from error

    def _receive(self) -> None:
        """Runs in a thread of its own until the process ends."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._changed:
                if isinstance(message, Ready):
                    self._ready = True
                elif isinstance(message, Failure) and message.ticket is None:
                    self._failure = _exception(message, "the teacher process failed")
                else:
                    self._pending.discard(message.ticket)
                    self._answered_s[message.ticket] = time.perf_counter()
                    self._answers[message.ticket] = message.result if isinstance(message, Answer) else message
                self._changed.notify_all()
        status = self._process.wait()
        with self._changed:
            if self._failure is None:
                self._failure = JudgeError(f"the teacher process {self._process.pid} {_ending(status)}")
            self._changed.notify_all()


def _spawn() -> tuple[subprocess.Popen[bytes], Connection]:
    """A fresh interpreter, not a fork: nothing of torch, CUDA or NCCL comes along."""
    ours, theirs = socket.socketpair()
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package_root, *(p for p in sys.path if p)])
    # One thread: the judge must not take cores from the trainer. No GPU: it needs none.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_sip.teacher.worker", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    return process, Connection(ours.detach())


def _exception(failure: Failure, what: str) -> SIPError:
    """A user's mistake keeps its kind and its one line; anything else comes with the traceback."""
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, SIPError):
        return kind(failure.message)
    return JudgeError(f"{what}: {failure.kind}: {failure.message}\n{failure.traceback}")


def _ending(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}: look for a lack of memory"
    return f"ended with status {status}"
