"""When training pauses and what is asked again, with a link that gives scripted answers.

Covers one replica; that replicas decide alike is the sum over them, which is stood in for here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sip.errors import JudgeError
from megatron_sip.teacher.http.failures import KINDS
from megatron_sip.teacher.interfaces import GroupVerdict
from megatron_sip.train import verdicts as subject
from megatron_sip.train.teacher_link import JudgedGroups, Rewrites
from megatron_sip.train.verdicts import PauseRule, VerdictDesk, Verdicts


def answer(*failed: int, kind: str = "transport", score: float = 1.0) -> JudgedGroups:
    """One group for each number: how many of its 10 calls failed."""
    groups = tuple(
        GroupVerdict(np.array([score, np.nan if count else 0.0]), {}, 10, count, num_comparisons=1, latency_s=0.0)
        for count in failed
    )
    counts = {"calls": 10.0 * len(failed), "failures": float(sum(failed)), **{f"failures_{k}": 0.0 for k in KINDS}}
    counts[f"failures_{kind}"] = float(sum(failed))
    return JudgedGroups(groups, counts, np.full(len(failed), 0.5), duration_s=2.0, outage=f"{kind}: why" * any(failed))


class ScriptedLink:
    """Answers in order; notes which groups were asked for."""

    timeout_s = 600.0

    def __init__(self, answers: Sequence[Any], late: bool = False) -> None:
        self._answers = list(answers)
        self._late = late
        self.asked: list[list[str]] = []
        self.reasons: list[str] = []

    def submit_groups(self, groups: Sequence[Any], learn: bool = True, step: int | None = None) -> int:
        assert not learn and step == 7
        self.asked.append(list(groups))
        return len(self.asked)

    def wait(
        self, ticket: int | None, may_stop: bool = False, timeout_s: float | None = None, reason: str = ""
    ) -> float | None:
        assert may_stop
        self.reasons.append(reason)
        return None if self._late and timeout_s is None else 0.25

    def fetch_groups(self, ticket: int) -> JudgedGroups:
        return self._answers.pop(0)

    def submit_rewrites(self, samples: Sequence[Any], step: int | None = None) -> int:
        self.asked.append(list(samples))
        return len(self.asked)

    def fetch_rewrites(self, ticket: int, samples: Sequence[Any]) -> Any:
        return self._answers.pop(0)

    def age_s(self, ticket: int) -> float:
        return 1.0

    def stop_if_asked(self) -> None:
        pass


class Desk:
    """A desk on a scripted link, with what it said and how often it saved."""

    def __init__(self, *answers: Any, late: bool = False, rate: float = 0.5, window: int = 1) -> None:
        self.said: list[str] = []
        self.saves = 0
        self.link = ScriptedLink(answers, late)
        context = SimpleNamespace(
            sum_over_data_parallel=dict, any_rank=bool, gather_over_data_parallel=lambda value: ["", value]
        )
        rule = PauseRule(rate, window)
        self._desk = VerdictDesk(self.link, context, rule, self.said.append)  # type: ignore[arg-type]

    def collect(self, judged: JudgedGroups | None = None) -> Verdicts:
        """``judged``: verdicts that came with a checkpoint."""
        prepared = SimpleNamespace(step=7, judged=judged, judge_ticket=1, groups=["a", "b", "c"])
        return self._desk.collect(prepared, self._save)  # type: ignore[arg-type]

    def collect_rewrites(self) -> Rewrites:
        return self._desk.collect_rewrites(1, ["a", "b", "c"], 7, self._save)  # type: ignore[list-item]

    def _save(self) -> None:
        self.saves += 1


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_FIRST_RETRY_S", 0.0)


def test_few_failures_are_left_missing_and_pause_nothing() -> None:
    desk = Desk(answer(10, 4, 0))
    found = desk.collect()
    assert (found.num_pauses, desk.saves, desk.said, desk.link.asked) == (0, 0, [], [])
    assert found.exposed_wait_s == 0.25 and found.headroom_s == 0.75
    assert np.isnan(found.judged.verdicts[0].scores[1])


def test_an_outage_saves_probes_until_served_and_asks_again_what_failed_and_only_that() -> None:
    desk = Desk(answer(10, 0, 10), answer(10), answer(0), answer(0, 1, score=3.0))
    found = desk.collect()
    # What is said while a probe keeps the run waiting is what the one before it met.
    assert "67% of 30 judge calls failed" in desk.link.reasons[1] and "transport: why" in desk.link.reasons[1]
    assert desk.link.reasons[2] == "10 of 10 calls failed again; for example transport: why"
    # A probe of the first failed group fails, the next succeeds; then both failed groups are asked.
    assert desk.link.asked == [["a"], ["a"], ["a", "c"]]
    assert desk.saves == 1 and found.num_pauses == 1
    assert "67% of 30 judge calls failed (transport 20), the limit is 50% (--judge-pause-failure-rate)" in desk.said[0]
    assert "; for example transport: why. Look at the servers" in desk.said[0]
    assert "training goes on at iteration 7" in desk.said[-1] and len(desk.said) == 2
    assert [verdict.scores[0] for verdict in found.judged.verdicts] == [3.0, 1.0, 3.0]
    assert [verdict.num_failures for verdict in found.judged.verdicts] == [0, 0, 1]
    # Calls of the step and of the repeat; probes are no part of its verdicts.
    assert found.judged.counts["calls"] == 50 and found.judged.counts["failures"] == 21
    assert len(found.judged.latencies_s) == 5


def test_an_outage_that_comes_back_during_the_repeat_is_one_pause() -> None:
    desk = Desk(answer(10, 10, 0), answer(0), answer(10, 0), answer(0), answer(0))
    found = desk.collect()
    assert desk.link.asked == [["a"], ["a", "b"], ["a"], ["a"]]
    assert found.num_pauses == 1 and desk.saves == 1 and "the pause goes on" in desk.said[1]
    assert not any(verdict.num_failures for verdict in found.judged.verdicts)


@pytest.mark.parametrize("kind", ["unparsable", "refused", "too_long"])
def test_bad_answers_of_servers_that_work_are_no_outage(kind: str) -> None:
    desk = Desk(answer(10, 10, 10, kind=kind))
    assert desk.collect().num_pauses == 0 and not desk.saves


def test_the_rate_is_measured_over_the_window() -> None:
    desk = Desk(answer(0, 0, 0), answer(10, 10, 0), answer(10, 2, 0), answer(0), answer(0, 0), window=2)
    assert desk.collect().num_pauses == 0
    assert desk.collect().num_pauses == 0, "20 of 60 calls"
    assert desk.collect().num_pauses == 1, "32 of 60 calls"


def test_verdicts_that_are_too_late_pause_too_and_are_waited_for() -> None:
    desk = Desk(answer(0, 0, 0), late=True)
    found = desk.collect()
    assert found.num_pauses == 1 and desk.saves == 1 and "--judge-timeout-s" in desk.said[0]


def test_without_pauses_late_verdicts_end_the_run_and_failures_stay_missing() -> None:
    with pytest.raises(JudgeError, match="raise --judge-timeout-s"):
        Desk(answer(0, 0, 0), late=True, rate=0.0).collect()
    found = Desk(answer(10, 10, 10), rate=0.0).collect()
    assert found.num_pauses == 0 and all(np.isnan(v.scores[1]) for v in found.judged.verdicts)


def test_rewrites_that_an_outage_has_cost_are_asked_again_and_refused_ones_are_not() -> None:
    one, two = np.array([1]), np.array([2])
    first = Rewrites((None, one, None), (True, False, True))
    desk = Desk(first, Rewrites((None, None), (True, True)), Rewrites((two, None), (False, False)))
    found = desk.collect_rewrites()
    assert desk.link.asked == [["a", "c"], ["a", "c"]] and desk.saves == 1
    assert found.tokens == (two, one, None) and "2 of 3 rewrites failed" in desk.said[0]
    refused = Desk(Rewrites((None, None, None), (False, False, False)))
    assert refused.collect_rewrites().tokens == (None, None, None) and not refused.said


def test_a_resumed_run_counts_the_failures_of_the_steps_before_as_the_straight_one_does() -> None:
    def second_step(before: Desk | None) -> int:
        desk = Desk(answer(2, 0), window=2, rate=0.2)
        if before is not None:
            desk._desk.load_state_dict(before._desk.state_dict())
        return desk.collect().num_pauses

    # 2 of 20 calls alone, and with 0 of 10 or 1 of 10 before: below a fifth. With 5 of 10 it is 7 of 30: above.
    quiet, loud = Desk(answer(1), window=2, rate=0.9), Desk(window=2, rate=0.9)
    assert quiet.collect().num_pauses == 0 and loud.collect(answer(5)).num_pauses == 0
    assert second_step(None) == second_step(quiet) == 0
    desk = Desk(answer(2, 0), answer(0), answer(0), window=2, rate=0.2)
    desk._desk.load_state_dict(loud._desk.state_dict())
    assert desk.collect().num_pauses == 1
