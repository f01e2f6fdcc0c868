"""The one place where a data-parallel replica talks to its teacher: the leader asks, the replica hears.

Submitting costs the leader one message to another process. Waiting is done by all ranks of the job together, in
heartbeats: no rank waits inside a collective for a teacher, and a signal or a time limit ends the wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sip.checkpoint import StopDecision
from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import JudgeError
from megatron_sip.observability.timers import Timers
from megatron_sip.teacher import JudgeResult, RewriteResult, TeacherProcess
from megatron_sip.teacher.convert import judge_request, judgments, rewrite_candidates, rewrite_request
from megatron_sip.teacher.http.failures import KINDS, REJECTED, REMOTE_COUNTS, SERVER, TRANSPORT, kind_of
from megatron_sip.teacher.interfaces import GroupVerdict
from megatron_sip.tokenizer import Tokenizer
from megatron_sip.types import CandidateGroup, FloatArray, IntArray, Judgment, Sample

HEARTBEAT_S = 0.5
"""No rank is in a collective for much longer while verdicts are late: far below every time-out of a process group."""

OUTAGE = (TRANSPORT, SERVER, REJECTED)
"""Failures that speak of servers, which come back; another answer that cannot be parsed is not worth a pause."""

_SAY_EVERY_S = 60.0


class RunStopped(Exception):
    """The run is to save and end, and this rank was waiting for its teacher. All ranks raise it together."""

    def __init__(self, decision: StopDecision) -> None:
        super().__init__(decision.reason)
        self.decision = decision


@dataclass(frozen=True)
class JudgedGroups:
    """What the teacher said of one submission, equal on all ranks of the replica."""

    verdicts: tuple[GroupVerdict, ...]
    counts: Mapping[str, float]
    """Sums that add up over replicas: calls, failures (also per kind), both_orders, flips, cached, and what the client
    of a remote judge counted."""
    latencies_s: FloatArray
    """Per call."""
    duration_s: float = 0.0
    """From submission to the last verdict, all rounds included; 0 if it is not known."""
    outage: str = ""
    """A failure of the servers, word for word, if there was one."""

    @property
    def out_of_order(self) -> bool:
        """Whether some are missing because of the servers."""
        return any(self.counts[f"failures_{kind}"] for kind in OUTAGE)

    @property
    def judgments(self) -> list[Judgment]:
        """One per group."""
        return judgments(self.verdicts)


@dataclass(frozen=True)
class Rewrites:
    """What the rewriter gave for the samples of one submission, in their order; equal on all ranks of the replica."""

    tokens: tuple[IntArray | None, ...]
    """Token ids [<= N]; None where there is no rewrite."""
    out_of_order: tuple[bool, ...]
    """Whether it is missing because of the servers."""
    outage: str = ""
    """The first such failure, word for word."""


class TeacherLink:
    """Tickets for rewrites and judgments of this replica's samples."""

    def __init__(
        self,
        process: TeacherProcess | None,
        tokenizer: Tokenizer,
        context: ParallelContext,
        timers: Timers,
        suffix_length: int,
        timeout_s: float,
        decide_stop: Callable[[], StopDecision | None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
        diagnose: Callable[[], str] = lambda: "",
    ) -> None:
        """``process``: on the leader the running teacher, elsewhere None. ``timeout_s`` bounds one wait for it.

        ``decide_stop``: collective, answers alike on all ranks. ``say``: prints a line on one rank.
        ``diagnose``: there, what is wrong with the teacher's servers now; takes seconds.
        """
        self._process = process
        self._tokenizer = tokenizer
        self._context = context
        self._timers = timers
        self._suffix_length = suffix_length
        self.timeout_s = timeout_s
        self._decide_stop = decide_stop
        self._say = say
        self._diagnose = diagnose
        self._next_ticket = 0
        self._submitted_s: dict[int, float] = {}

    def submit_groups(self, groups: Sequence[CandidateGroup], learn: bool = True, step: int | None = None) -> int:
        """Hands groups to the judges; ``learn`` False leaves running statistics of a judge as they are.

        ``step``: optimizer steps before it, for the ledger.
        """
        ticket = self._ticket()
        if self._process is not None:
            self._process.submit(ticket, judge_request(groups, self._tokenizer, learn, step))
        return ticket

    def all_ready(self, ticket: int | None, wait_s: float = 0.0) -> bool:
        """Whether the teachers of all replicas have answered, after at most ``wait_s``. Collective over the job.

        ``ticket`` None: this replica has asked nothing.
        """
        return not self._context.any_rank(not self._own_ready(ticket, wait_s))

    def wait(
        self, ticket: int | None, may_stop: bool = False, timeout_s: float | None = None, reason: str = ""
    ) -> float | None:
        """Seconds until the teachers of all replicas have answered, not counting what the device still had to do; None
        after ``timeout_s``. Collective over the job. ``reason``: why it may take long, for the lines that say so.

        Raises:
            RunStopped: the run is to end and ``may_stop``.
        """
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        with self._timers("judge"):
            started = said = time.perf_counter()
            while True:
                own = self._own_ready(ticket, HEARTBEAT_S)
                now = time.perf_counter()
                late, over = self._context.any_rank_each([not own, now - started >= limit_s])
                if not late:
                    return now - started
                if over:
                    return None
                if may_stop:
                    self.stop_if_asked()
                if now - said >= _SAY_EVERY_S:
                    said = now
                    limit = "no limit" if limit_s == math.inf else f"of {limit_s:g} s"
                    why = reason or self._diagnose()
                    self._say(f"waiting for the teacher since {now - started:.0f} s ({limit}){': ' * bool(why)}{why}")

    def stop_if_asked(self) -> None:
        """Collective. Raises RunStopped if the run is to end."""
        decision = self._decide_stop()
        if decision is not None:
            raise RunStopped(decision)

    def age_s(self, ticket: int) -> float:
        """Seconds since the submission of a ticket that is still out or not fetched."""
        return time.perf_counter() - self._submitted_s[ticket]

    def fetch_groups(self, ticket: int) -> JudgedGroups:
        """The verdicts of a submission that is ready. Collective over the replica.

        Raises:
            JudgeError: the teacher died or failed.
        """
        judged: JudgedGroups | None = None
        del self._submitted_s[ticket]
        if self._process is not None:
            duration_s = self._process.duration_s(ticket) if self._process.peek(ticket) is not None else 0.0
            result = self._process.collect(ticket, self.timeout_s)
            assert isinstance(result, JudgeResult)
            judged = _judged(result, duration_s)
        return self._context.broadcast_object(judged)

    def peek_groups(self, ticket: int) -> JudgedGroups | None:
        """The verdicts of a submission if they are there; they stay to be fetched. Collective over the replica."""
        judged: JudgedGroups | None = None
        if self._process is not None:
            result = self._process.peek(ticket)
            if result is not None:
                assert isinstance(result, JudgeResult)
                judged = _judged(result, self._process.duration_s(ticket))
        return self._context.broadcast_object(judged)

    def collect_groups(self, ticket: int) -> JudgedGroups:
        """Waits for the verdicts of a submission. Collective over the job.

        Raises:
            JudgeError: the teacher died or is later than its time-out.
        """
        self._require(self.wait(ticket) is not None)
        return self.fetch_groups(ticket)

    @property
    def num_out(self) -> int:
        """Submissions of this replica's leader without an answer; 0 on other ranks."""
        return 0 if self._process is None else self._process.num_out

    def submit_rewrites(self, samples: Sequence[Sample], step: int | None = None) -> int:
        """Asks for a rewrite of each sample's suffix."""
        ticket = self._ticket()
        if self._process is not None:
            self._process.submit(ticket, rewrite_request(samples, self._tokenizer, step))
        return ticket

    def fetch_rewrites(self, ticket: int, samples: Sequence[Sample]) -> Rewrites:
        """What the rewriter gave for a submission that is ready. Collective over the replica.

        Raises:
            JudgeError: the teacher died or failed.
        """
        rewrites: Rewrites | None = None
        del self._submitted_s[ticket]
        if self._process is not None:
            result = self._process.collect(ticket, self.timeout_s)
            assert isinstance(result, RewriteResult)
            candidates = rewrite_candidates(result, samples, self._tokenizer, self._suffix_length)
            failed = [kind_of(rewrite.failure) in OUTAGE for rewrite in result.rewrites]
            rewrites = Rewrites(
                tuple(None if candidate is None else candidate.tokens for candidate in candidates),
                tuple(failed),
                next((r.failure for r, is_failed in zip(result.rewrites, failed, strict=True) if is_failed), ""),
            )
        return self._context.broadcast_object(rewrites)

    def collect_rewrites(self, ticket: int, samples: Sequence[Sample]) -> Rewrites:
        """Waits for them. Collective over the job.

        Raises:
            JudgeError: the teacher died or is later than its time-out.
        """
        self._require(self.wait(ticket) is not None)
        return self.fetch_rewrites(ticket, samples)

    def settle(self) -> None:
        """Returns when the answers have come on which a judge's running statistics rest; others are not waited for."""
        if self._process is not None:
            self._process.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of the teacher of each replica, in their order. Collective."""
        own = None if self._process is None else _to_tensors(self._process.state_dict())
        return {"replicas": self._context.gather_over_data_parallel(self._context.broadcast_object(own))}

    def load_state_dict(self, state: Mapping[str, Any], again: Mapping[str, Sequence[int]] | None = None) -> None:
        """Goes on from a checkpoint. With another number of replicas each takes over that of a former one.

        ``again``: steps of which a ledger is not to count former failures (``Ledger.load_state_dict``).
        """
        # A checkpoint of a phase without a teacher has nothing of one.
        replicas = [replica for replica in state["replicas"] if replica is not None]
        if self._process is not None and replicas:
            own = _to_arrays(replicas[self._context.dp_rank % len(replicas)])
            self._process.load_state_dict({**own, "again": again or {}})

    def close(self) -> None:
        """Ends the teacher's process."""
        if self._process is not None:
            self._process.close()

    def _own_ready(self, ticket: int | None, wait_s: float) -> bool:
        if self._process is None or ticket is None:
            return True
        return self._process.wait(ticket, wait_s) if wait_s else self._process.ready(ticket)

    def _require(self, answered: bool) -> None:
        if not answered:
            raise JudgeError(
                f"no answer of the teacher after {self.timeout_s:g} s: it is slow or stuck; raise --judge-timeout-s"
            )

    def _ticket(self) -> int:
        self._next_ticket += 1
        self._submitted_s[self._next_ticket] = time.perf_counter()
        return self._next_ticket


def _judged(result: JudgeResult, duration_s: float) -> JudgedGroups:
    counts = {
        "calls": float(sum(v.num_calls for v in result.groups)),
        "failures": float(sum(v.num_failures for v in result.groups)),
        "both_orders": float(result.num_both_orders),
        "flips": float(result.num_flips),
        "cached": float(result.num_cached),
        **{f"failures_{kind}": float(result.failures.get(kind, 0)) for kind in KINDS},
        **{f"remote_{name}": float(result.remote.get(name, 0)) for name in REMOTE_COUNTS},
    }
    latencies_s = np.asarray(result.latencies_s, dtype=np.float64)
    outage = next((result.examples[kind] for kind in OUTAGE if kind in result.examples), "")
    return JudgedGroups(tuple(result.groups), counts, latencies_s, duration_s, outage)


def _to_tensors(state: Any) -> Any:
    """A copy with tensors for arrays: checkpoints hold tensors, the teacher's process knows no torch."""
    if isinstance(state, Mapping):
        return {key: _to_tensors(value) for key, value in state.items()}
    return torch.from_numpy(state) if isinstance(state, np.ndarray) else state


def _to_arrays(state: Any) -> Any:
    """The other way round."""
    if isinstance(state, Mapping):
        return {key: _to_arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, torch.Tensor) else state
