"""The one place where a data-parallel replica talks to its teacher: the leader asks, the replica hears.

Submitting costs the leader one message to another process. Collecting is where a step waits, and that wait is timed: it
is the judge's exposed time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sip.distributed import ParallelContext
from megatron_sip.observability.timers import Timers
from megatron_sip.teacher import JudgeResult, RewriteResult, TeacherProcess
from megatron_sip.teacher.convert import judge_request, judgments, rewrite_candidates, rewrite_request
from megatron_sip.teacher.http.failures import KINDS, REMOTE_COUNTS
from megatron_sip.tokenizer import Tokenizer
from megatron_sip.types import CandidateGroup, IntArray, Judgment, Sample


@dataclass(frozen=True)
class JudgedGroups:
    """What the teacher said of one submission, equal on all ranks of the replica."""

    judgments: tuple[Judgment, ...]
    counts: Mapping[str, float]
    """Sums that add up over replicas: calls, failures (also per kind), comparisons, both_orders, flips, cached, and
    what the client of a remote judge counted."""
    latencies_s: tuple[float, ...]
    """Per call."""
    exposed_wait_s: float


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
    ) -> None:
        """``process``: on the leader the running teacher, elsewhere None. ``timeout_s`` bounds one wait for it."""
        self._process = process
        self._tokenizer = tokenizer
        self._context = context
        self._timers = timers
        self._suffix_length = suffix_length
        self._timeout_s = timeout_s
        self._next_ticket = 0

    def submit_groups(self, groups: Sequence[CandidateGroup], learn: bool = True, step: int | None = None) -> int:
        """Hands groups to the judges; ``learn`` False leaves running statistics of a judge as they are.

        ``step``: optimizer steps before it, for the ledger.
        """
        ticket = self._ticket()
        if self._process is not None:
            self._process.submit(ticket, judge_request(groups, self._tokenizer, learn, step))
        return ticket

    def collect_groups(self, ticket: int) -> JudgedGroups:
        """Waits for the verdicts of a submission. Collective over the replica.

        Raises:
            JudgeError: the teacher died or is later than its time-out.
        """
        started = time.perf_counter()
        judged: JudgedGroups | None = None
        with self._timers("judge"):
            if self._process is not None:
                result = self._process.collect(ticket, self._timeout_s)
                assert isinstance(result, JudgeResult)
                judged = _judged(result, time.perf_counter() - started)
            return self._context.broadcast_object(judged)

    def submit_rewrites(self, samples: Sequence[Sample], step: int | None = None) -> int:
        """Asks for a rewrite of each sample's suffix."""
        ticket = self._ticket()
        if self._process is not None:
            self._process.submit(ticket, rewrite_request(samples, self._tokenizer, step))
        return ticket

    def collect_rewrites(self, ticket: int, samples: Sequence[Sample]) -> list[IntArray | None]:
        """Token ids [<= N] per sample, None where the rewriter gave nothing. Collective over the replica."""
        rewrites: list[IntArray | None] | None = None
        with self._timers("judge"):
            if self._process is not None:
                result = self._process.collect(ticket, self._timeout_s)
                assert isinstance(result, RewriteResult)
                candidates = rewrite_candidates(result, samples, self._tokenizer, self._suffix_length)
                rewrites = [None if candidate is None else candidate.tokens for candidate in candidates]
            return self._context.broadcast_object(rewrites)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of the teacher of each replica, in their order. Collective."""
        own = None if self._process is None else _to_tensors(self._process.state_dict())
        return {"replicas": self._context.gather_over_data_parallel(self._context.broadcast_object(own))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint. With another number of replicas each takes over that of a former one."""
        # A checkpoint of a phase without a teacher has nothing of one.
        replicas = [replica for replica in state["replicas"] if replica is not None]
        if self._process is not None and replicas:
            self._process.load_state_dict(_to_arrays(replicas[self._context.dp_rank % len(replicas)]))

    def close(self) -> None:
        """Ends the teacher's process."""
        if self._process is not None:
            self._process.close()

    def _ticket(self) -> int:
        self._next_ticket += 1
        return self._next_ticket


def _judged(result: JudgeResult, exposed_wait_s: float) -> JudgedGroups:
    counts = {
        "groups": float(len(result.groups)),
        "calls": float(sum(v.num_calls for v in result.groups)),
        "failures": float(sum(v.num_failures for v in result.groups)),
        "comparisons": float(sum(v.num_comparisons for v in result.groups)),
        "both_orders": float(result.num_both_orders),
        "flips": float(result.num_flips),
        "cached": float(result.num_cached),
        **{f"failures_{kind}": float(result.failures.get(kind, 0)) for kind in KINDS},
        **{f"remote_{name}": float(result.remote.get(name, 0)) for name in REMOTE_COUNTS},
    }
    return JudgedGroups(tuple(judgments(result)), counts, tuple(map(float, result.latencies_s)), exposed_wait_s)


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
