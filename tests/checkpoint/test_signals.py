"""When a run saves and ends early."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest

from megatron_sip.checkpoint import StopDecision, StopSignals, StopWatch


@dataclass
class OneOfTwo:
    """A context in which the other rank raises the flags of ``theirs``, call by call."""

    theirs: list[bool]

    def any_rank(self, flag: bool) -> bool:
        return self.theirs.pop(0) or flag


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def decide(watch: StopWatch, *theirs: bool) -> StopDecision | None:
    context = OneOfTwo(list(theirs) + [False] * 4)
    return watch.decide(context)  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_noted_and_ends_the_run_with_128_plus_its_number(number: int, code: int) -> None:
    with StopSignals() as signals:
        watch = StopWatch(signals, None)
        assert decide(watch) is None
        os.kill(os.getpid(), number)
        assert decide(watch) == StopDecision(f"received {signal.Signals(number).name}", code)


def test_signal_on_another_rank_ends_this_one_alike() -> None:
    with StopSignals() as signals:
        # its flags: something happened, it is SIGTERM
        assert decide(StopWatch(signals, None), True, True) == StopDecision("received SIGTERM", 143)


def test_time_is_up_after_the_given_minutes_and_not_before() -> None:
    clock = Clock()
    with StopSignals() as signals:
        watch = StopWatch(signals, 2.0, clock)
        clock.now_s += 119.9
        assert decide(watch) is None
        clock.now_s += 0.1
        assert decide(watch) == StopDecision("--exit-duration-in-mins 2 is over", 0)


def test_second_interrupt_is_held_back_only_while_it_may_be_torchruns_echo_of_the_first() -> None:
    before, clock = signal.getsignal(signal.SIGINT), Clock()
    with StopSignals(clock) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        clock.now_s += 2.0
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        clock.now_s += 10.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_rank_that_torchrun_left_behind_saves_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    with StopSignals() as signals:
        assert decide(StopWatch(signals, None)) is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert decide(StopWatch(signals, None)) == StopDecision("torchrun has ended without this rank", 1)


def test_rank_that_a_shell_started_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopSignals() as signals:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert decide(StopWatch(signals, None)) is None
