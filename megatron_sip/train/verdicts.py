"""How a step gets its verdicts: it waits for them with all ranks, and pauses while the judge is out of order.

A pause is decided by all ranks together, from counts summed over the replicas. The run has saved its state by then,
and no rank waits in a collective: all meet in heartbeats (``teacher_link``), where a signal or a time limit ends it.
Once a few questions are answered again, all that had failed are asked once more: an outage costs no verdicts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import JudgeError
from megatron_sip.train.prepare import PreparedStep
from megatron_sip.train.teacher_link import HEARTBEAT_S, OUTAGE, JudgedGroups, Rewrites, TeacherLink
from megatron_sip.types import CandidateGroup, Sample

_FIRST_RETRY_S, _LAST_RETRY_S = 2.0, 60.0
_NO_LIMIT_S = float("inf")


@dataclass(frozen=True)
class PauseRule:
    failure_rate: float
    """Share of failed calls from which on training pauses; 0: never."""
    window: int
    """Steps over which it is measured."""


@dataclass(frozen=True)
class Verdicts:
    """A step's verdicts, and how they came."""

    judged: JudgedGroups
    exposed_wait_s: float
    """Time in which the step had nothing else to do."""
    headroom_s: float | None = None
    """From submission to the moment when the step needed them; None for verdicts that came with a checkpoint."""
    num_pauses: int = 0
    paused_s: float = 0.0


class VerdictDesk:
    """Collects the verdicts of steps, in order. All methods are collective over the job."""

    def __init__(
        self, link: TeacherLink, context: ParallelContext, rule: PauseRule, say: Callable[[str], None]
    ) -> None:
        self._link = link
        self._context = context
        self._rule = rule
        self._say = say
        self._recent: deque[tuple[float, float]] = deque(maxlen=rule.window)

    def ready(self, prepared: PreparedStep) -> bool:
        """Whether ``collect`` need not wait."""
        return prepared.judged is not None or self._link.all_ready(prepared.judge_ticket)

    def collect(self, prepared: PreparedStep, save: Callable[[], None]) -> Verdicts:
        """Waits for the verdicts of a step. ``save`` keeps the run's state as it was before the step.

        Raises:
            JudgeError: the teacher died, or is later than its time-out and pauses are off.
            RunStopped: the run is to end.
        """
        pause = _Pause(self._say, save, prepared.step)
        judged, waited_s, headroom_s = self._first(prepared, pause)
        latest = judged
        while (outage := self._outage(latest)) is not None:
            pause.begin(outage)
            failed = [i for i, verdict in enumerate(judged.verdicts) if verdict.num_failures]
            self._until_served([prepared.groups[i] for i in failed[:1]], prepared.step, outage)
            self._recent.clear()
            latest = self._ask_again([prepared.groups[i] for i in failed], prepared.step, judged, outage)
            judged = _merged(judged, failed, latest)
        pause.end()
        return Verdicts(judged, waited_s, headroom_s, pause.count, pause.seconds)

    def _first(self, prepared: PreparedStep, pause: _Pause) -> tuple[JudgedGroups, float, float | None]:
        """What the submission brought, the seconds waited for it, and the headroom."""
        if prepared.judged is not None:
            return prepared.judged, 0.0, None
        assert prepared.judge_ticket is not None
        waited_s = self._wait(prepared.judge_ticket, pause)
        headroom_s = self._link.age_s(prepared.judge_ticket) - waited_s
        return self._link.fetch_groups(prepared.judge_ticket), waited_s, headroom_s

    def collect_rewrites(self, ticket: int, samples: Sequence[Sample], step: int, save: Callable[[], None]) -> Rewrites:
        """Waits for the rewrites of samples of a step that is being prepared; asks again what an outage has cost.

        Raises as ``collect``.
        """
        pause, rest_s = _Pause(self._say, save, step), _FIRST_RETRY_S
        self._wait(ticket, pause)
        rewrites = latest = self._link.fetch_rewrites(ticket, samples)
        while (outage := self._rewriter_outage(latest)) is not None:
            pause.begin(outage)
            self._rest(rest_s)
            rest_s = min(_LAST_RETRY_S, 2 * rest_s)
            places = [place for place, missing in enumerate(rewrites.out_of_order) if missing]
            asked = [samples[place] for place in places]
            again = self._link.submit_rewrites(asked, step) if asked else None
            self._link.wait(again, may_stop=True, timeout_s=_NO_LIMIT_S, reason=outage)
            latest = Rewrites((), ()) if again is None else self._link.fetch_rewrites(again, asked)
            rewrites = _with_rewrites(rewrites, places, latest)
        pause.end()
        return rewrites

    def state_dict(self) -> dict[str, Any]:
        """Calls and failures of the last steps, which decide about a pause."""
        return {"recent": [list(counts) for counts in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent.clear()
        self._recent.extend((float(calls), float(failures)) for calls, failures in state.get("recent", ()))

    def _rewriter_outage(self, rewrites: Rewrites) -> str | None:
        own = {"asked": float(len(rewrites.tokens)), "missing": float(sum(rewrites.out_of_order))}
        sums, limit = self._context.sum_over_data_parallel(own), self._rule.failure_rate
        if not limit or not sums["asked"] or sums["missing"] < limit * sums["asked"]:
            return None
        return (
            f"{sums['missing']:.0f} of {sums['asked']:.0f} rewrites failed for their servers, the limit is {limit:.0%} "
            f"(--judge-pause-failure-rate){self._example(rewrites.outage)}"
        )

    def _example(self, own: str) -> str:
        """A failure of one of the replicas. Collective."""
        found = next((text for text in self._context.gather_over_data_parallel(own) if text), "")
        return f"; for example {found.rstrip('.')}" if found else ""

    def _wait(self, ticket: int, pause: _Pause) -> float:
        """Seconds; verdicts that are later than their time-out are the beginning of a pause."""
        started = time.perf_counter()
        waited_s = self._link.wait(ticket, may_stop=True)
        if waited_s is not None:
            return waited_s
        if not self._rule.failure_rate:
            raise JudgeError(
                f"no answer after {self._link.timeout_s:g} s: the teacher is slow or stuck; raise --judge-timeout-s"
            )
        pause.begin(f"no answer after {self._link.timeout_s:g} s (--judge-timeout-s)")
        self._link.wait(ticket, may_stop=True, timeout_s=_NO_LIMIT_S)
        return time.perf_counter() - started

    def _outage(self, judged: JudgedGroups) -> str | None:
        """What is wrong with the judge, or None if its failures are few enough."""
        if not self._rule.failure_rate:
            return None
        sums = self._context.sum_over_data_parallel(judged.counts)
        failed = {kind: sums[f"failures_{kind}"] for kind in OUTAGE}
        self._recent.append((sums["calls"], sum(failed.values())))
        calls, failures = (sum(counts) for counts in zip(*self._recent, strict=True))
        if not calls or failures / calls < self._rule.failure_rate:
            return None
        kinds = ", ".join(f"{kind} {count:.0f}" for kind, count in failed.items() if count)
        return (
            f"{failures / calls:.0%} of {calls:.0f} judge calls failed ({kinds or 'in the steps before'}), "
            f"the limit is {self._rule.failure_rate:.0%} (--judge-pause-failure-rate){self._example(judged.outage)}"
        )

    def _until_served(self, groups: Sequence[CandidateGroup], step: int, outage: str) -> None:
        """Asks for a group of each replica that had failures until most calls succeed."""
        pause_s = _FIRST_RETRY_S
        while True:
            # Running statistics have met these groups.
            ticket = self._link.submit_groups(groups, learn=False, step=step) if groups else None
            self._link.wait(ticket, may_stop=True, timeout_s=_NO_LIMIT_S, reason=outage)
            own, latest = {"calls": 0.0, "failures": 0.0}, ""
            if ticket is not None:
                judged = self._link.fetch_groups(ticket)
                counts, latest = judged.counts, judged.outage
                own = {"calls": counts["calls"], "failures": sum(counts[f"failures_{kind}"] for kind in OUTAGE)}
            sums = self._context.sum_over_data_parallel(own)
            if sums["failures"] < self._rule.failure_rate * max(1.0, sums["calls"]):
                return
            outage = f"{sums['failures']:.0f} of {sums['calls']:.0f} calls failed again{self._example(latest)}"
            self._rest(pause_s)
            pause_s = min(_LAST_RETRY_S, 2 * pause_s)

    def _rest(self, seconds: float) -> None:
        """By the clock of any rank: all leave together."""
        end = time.perf_counter() + seconds
        while not self._context.any_rank(time.perf_counter() >= end):
            self._link.stop_if_asked()
            time.sleep(min(HEARTBEAT_S, seconds))

    def _ask_again(
        self, groups: Sequence[CandidateGroup], step: int, judged: JudgedGroups, outage: str
    ) -> JudgedGroups:
        """What is said of ``groups`` this time; a replica without any has nothing counted."""
        ticket = self._link.submit_groups(groups, learn=False, step=step) if groups else None
        self._link.wait(ticket, may_stop=True, timeout_s=_NO_LIMIT_S, reason=outage)
        if ticket is None:
            return JudgedGroups((), dict.fromkeys(judged.counts, 0.0), np.zeros(0))
        return self._link.fetch_groups(ticket)


def _merged(judged: JudgedGroups, places: Sequence[int], again: JudgedGroups) -> JudgedGroups:
    """``judged`` with the newer verdicts at ``places``; calls, failures and latencies of both count."""
    verdicts = list(judged.verdicts)
    for place, verdict in zip(places, again.verdicts, strict=True):
        verdicts[place] = verdict
    counts = {name: count + again.counts[name] for name, count in judged.counts.items()}
    latencies_s = np.concatenate([judged.latencies_s, again.latencies_s])
    return JudgedGroups(tuple(verdicts), counts, latencies_s, judged.duration_s)


def _with_rewrites(rewrites: Rewrites, places: Sequence[int], again: Rewrites) -> Rewrites:
    tokens, missing = list(rewrites.tokens), list(rewrites.out_of_order)
    for place, new, still in zip(places, again.tokens, again.out_of_order, strict=True):
        tokens[place], missing[place] = new, still
    return Rewrites(tuple(tokens), tuple(missing))


class _Pause:
    """From the first sign of an outage to its end; says so once at each end."""

    def __init__(self, say: Callable[[str], None], save: Callable[[], None], step: int) -> None:
        self._say = say
        self._save = save
        self._step = step
        self._started: float | None = None
        self.count = 0
        self.seconds = 0.0

    def begin(self, reason: str) -> None:
        if self._started is not None:
            self._say(f"the pause goes on: {reason}")
            return
        self._started = time.perf_counter()
        self.count += 1
        self._say(
            f"training pauses at iteration {self._step}: {reason}. Look at the servers of --judge-endpoints: it goes "
            "on by itself when they answer, and asks again what failed; SIGTERM saves and ends the run"
        )
        self._save()

    def end(self) -> None:
        if self._started is not None:
            self.seconds = time.perf_counter() - self._started
            self._say(f"training goes on at iteration {self._step}: the judge answers again after {self.seconds:.0f} s")
