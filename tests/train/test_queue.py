"""The queue of prepared steps and the rule of fills by themselves, with parts that only note what they are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.checkpoint import StopDecision
from megatron_sip.curriculum import Curriculum, CurriculumConfig, TriggerState
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.train.fill import FillRule, recorded_fills
from megatron_sip.train.lookahead import Lookahead
from megatron_sip.train.teacher_link import RunStopped

WAITING = [
    {"name": "warm-up", "ntp": 1.0, "steps": 4},
    {"name": "judged", "rollout": 1.0, "wait_for": {"rollout_win_rate": 0.2, "probe_every": 1}},
]
FIXED = [{"name": "first", "ntp": 1.0, "steps": 3}, {"name": "second", "rollout": 1.0}]


class Counter:
    """Stands for the loader: counts what is drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class Noting:
    """Stands for the preparer: notes (step, phase, steps done), and how far had been drawn by then."""

    def __init__(self, loader: Counter, stop_at: int = -1) -> None:
        self.prepared: list[tuple[int, str, int]] = []
        self.drawn_by_then: list[int] = []
        self._loader = loader
        self._stop_at = stop_at

    def draw(self, step: int, plan: Any) -> Any:
        self._loader.drawn += 1
        return SimpleNamespace(step=step, plan=plan, num_samples=sum(plan.counts.values()))

    def prepare(self, drawn: Any, steps_done: int, save: Any) -> Any:
        if drawn.step == self._stop_at:
            raise RunStopped(StopDecision("received SIGTERM", 143))
        self.prepared.append((drawn.step, drawn.plan.phase, steps_done))
        self.drawn_by_then.append(self._loader.drawn)
        return drawn


def queue(
    phases: list[dict[str, Any]], depth: int, iters: int, stop_at: int = -1, draw_ahead: int = 0
) -> tuple[Lookahead, Noting, Counter]:
    loader = Counter()
    preparer = Noting(loader, stop_at)
    noted = lambda step: {"step": step.step}  # noqa: E731
    saved = SimpleNamespace(
        state_of=noted,
        drawn_state=noted,
        restored=lambda state: SimpleNamespace(**state, num_samples=2),
        drawn_again=lambda state: SimpleNamespace(**state, num_samples=2, plan=SimpleNamespace(phase="as saved")),
    )
    curriculum = Curriculum(CurriculumConfig(phases=phases), 2)
    ahead = Lookahead(preparer, curriculum, loader, saved, depth, iters, draw_ahead)  # type: ignore[arg-type]
    return ahead, preparer, loader


def trained(ahead: Lookahead, iters: int, after: Callable[[int], TriggerState] = lambda step: TriggerState()) -> None:
    """The trainer's loop without training; ``after`` a step comes the trigger's new state."""
    trigger = TriggerState()
    for step in range(iters):
        ahead.extend(step, trigger, print)
        assert ahead.head(step).step == step
        ahead.done()
        trigger = after(step)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_each_step_is_prepared_once_in_its_own_phase_and_none_beyond_the_last(depth: int) -> None:
    ahead, preparer, _ = queue(FIXED, depth, 6)
    trained(ahead, 6)
    assert [(step, phase) for step, phase, _ in preparer.prepared] == [
        (step, "first" if step < 3 else "second") for step in range(6)
    ]
    assert [done for _, _, done in preparer.prepared] == [max(0, step - depth) for step in range(6)]
    assert len(ahead) == 0


@pytest.mark.parametrize(("depth", "draw_ahead"), [(0, 1), (1, 2)])
def test_rewrites_are_asked_for_whole_steps_before_a_step_is_prepared(depth: int, draw_ahead: int) -> None:
    ahead, preparer, loader = queue(FIXED, depth, 6, draw_ahead=draw_ahead)
    trained(ahead, 6)
    assert [step for step, _, _ in preparer.prepared] == list(range(6))
    assert [done for _, _, done in preparer.prepared] == [max(0, step - depth) for step in range(6)]
    # With step s those up to s + R are drawn, and none beyond the last.
    assert preparer.drawn_by_then == [min(6, step + draw_ahead + 1) for step in range(6)]
    assert loader.drawn == 6 and len(ahead) == 0 and ahead.num_samples == 0


@pytest.mark.parametrize(("depth", "draw_ahead", "first"), [(2, 0, 6), (2, 1, 7), (0, 2, 6)])
def test_a_phase_that_a_probe_opens_begins_with_the_first_step_that_is_not_drawn(
    depth: int, draw_ahead: int, first: int
) -> None:
    ahead, preparer, _ = queue(WAITING, depth, 10, draw_ahead=draw_ahead)
    curriculum = Curriculum(CurriculumConfig(phases=WAITING), 2)
    trigger = TriggerState()
    for step in range(10):
        ahead.extend(step, trigger, print)
        ahead.done()
        if curriculum.plan(step, trigger).probe:
            assert step == 3, "the first probe opens the phase: there is no other"
            trigger = curriculum.observe(step, 0.5, trigger, ahead.next_step(step + 1))
    # After step 3 the steps up to 3 + L + R were drawn already.
    assert trigger.opened == {"judged": first}
    assert [phase for _, phase, _ in preparer.prepared] == ["warm-up"] * first + ["judged"] * (10 - first)


def test_a_step_that_was_half_prepared_stays_drawn_and_is_the_first_after_a_resume() -> None:
    ahead, _, loader = queue(FIXED, 2, 6, stop_at=2, draw_ahead=1)
    with pytest.raises(RunStopped):
        ahead.extend(0, TriggerState(), print)
    assert loader.drawn == 4 and len(ahead) == 2 and ahead.num_samples == 8
    state = ahead.state_dict()
    assert state == {
        "data": {"drawn": 4}, "pending": [{"step": 0}, {"step": 1}], "drawn": [{"step": 2}, {"step": 3}],
    }  # fmt: skip
    assert ahead.asked_again({"step": 0, "pending": [{"step": 1, "verdicts": None}]}) == {
        "judged_again": (1,), "prepared_again": (2, 3, 4, 5),
    }  # fmt: skip
    resumed, preparer, loader = queue(FIXED, 2, 6, draw_ahead=1)
    resumed.load_state_dict(state)
    resumed.extend(0, TriggerState(), print)
    assert preparer.prepared == [(2, "as saved", 0)] and loader.drawn == 4
    resumed.done()
    resumed.extend(1, TriggerState(), print)
    assert [step for step, _, _ in preparer.prepared] == [2, 3] and loader.drawn == 5


def test_a_checkpoint_within_a_step_has_nothing_that_the_step_has_drawn() -> None:
    ahead, _, loader = queue(FIXED, 0, 6)
    ahead.extend(0, TriggerState(), print)
    with ahead.unfinished():
        loader.drawn += 5
        assert ahead.state_dict()["data"] == {"drawn": 1}
    assert ahead.state_dict()["data"] == {"drawn": 6}


def test_fills_end_with_the_verdicts_or_at_their_limit() -> None:
    rule = FillRule(round_windows=4, max_windows=10)
    assert rule.more(0, 0, lambda: False) and rule.more(0, 4, lambda: False)
    assert not rule.more(0, 8, lambda: False), "a third round would be 12 windows"
    assert not rule.more(0, 0, lambda: True)
    assert not FillRule(round_windows=4, max_windows=0).more(0, 0, lambda: False)


def test_recorded_fills_are_repeated_whenever_the_verdicts_come(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "fill/windows": 8.0}\n{"step": 2}\n{"step": 3, "fill/windows": 0.0}\n'
        '{"step": 4, "fill/windows": 6}\n'
    )
    recorded = recorded_fills(tmp_path / "metrics.jsonl")
    assert recorded == {1: 8, 4: 6}
    rule = FillRule(round_windows=4, max_windows=8, recorded=recorded)
    assert [rule.more(0, windows, lambda: True) for windows in (0, 4, 8)] == [True, True, False]
    assert not rule.more(1, 0, lambda: False)
    with pytest.raises(ConfigurationError, match="6 windows at iteration 4"):
        rule.more(3, 0, lambda: False)
    with pytest.raises(DataError, match="cannot be read"):
        recorded_fills(tmp_path / "nothing")
