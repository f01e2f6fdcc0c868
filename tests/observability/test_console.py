"""Console line, ETA, progress of tools, timers, throughput."""

import io

import pytest

from megatron_sip.observability.console import Console
from megatron_sip.observability.progress import Progress, RemainingTime, format_duration
from megatron_sip.observability.throughput import throughput_scalars, training_flops_per_token
from megatron_sip.observability.timers import Timers


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_console_line_has_megatrons_fields_and_means_over_its_interval():
    stream = io.StringIO()
    console = Console(total_steps=4, interval=2, stream=stream)
    steps = {"learning-rate": 1e-3, "batch-size": 16.0, "grad-norm": 2.0}
    console.update(1, {**steps, "lm loss": 6.0}, 16, elapsed_s=0.1)
    assert stream.getvalue() == ""
    console.update(2, {**steps, "lm loss": 4.0}, 32, elapsed_s=0.3, skipped=True, phase="warm-up")
    line = stream.getvalue()
    assert line.startswith(" [20") and line.count("\n") == 1
    for part in (
        "] iteration        2/       4 | consumed samples:           32 | elapsed time per iteration (ms): 200.0 |",
        "| learning rate: 1.000000E-03 | global batch size:    16 | lm loss: 5.000000E+00 | grad norm: 2.000 |",
        "| number of skipped iterations:   1 | phase: warm-up |",
        "| ETA: ",
    ):
        assert part in line


def test_the_mean_of_a_scalar_is_over_the_steps_that_had_it():
    stream = io.StringIO()
    console = Console(total_steps=3, interval=3, stream=stream)
    console.update(1, {"lm loss": 6.0}, 1, elapsed_s=0.1)
    console.update(2, {"lm loss": float("nan"), "sip/chosen_rate/rollout": 0.5}, 2, elapsed_s=0.1)
    console.update(3, {"lm loss": 2.0, "sip/chosen_rate/rollout": 0.25}, 3, elapsed_s=0.1)
    assert "lm loss: 4.000000E+00" in stream.getvalue()
    assert "rollout chosen: 0.375" in stream.getvalue()


def test_the_last_step_prints_even_off_the_interval():
    stream = io.StringIO()
    Console(total_steps=7, interval=10, stream=stream).update(7, {"lm loss": 1.0}, 7, elapsed_s=0.1)
    assert "iteration        7/       7" in stream.getvalue()


def test_the_time_left_follows_the_recent_pace():
    remaining = RemainingTime(total=100, window=2)
    assert remaining.update(1, now=0.0) is None
    assert remaining.update(2, now=1.0) == 98.0
    # Two slow steps push the fast one out of the window: (3, 11) and (4, 21) after (2, 1) is 10 s a step.
    remaining.update(3, now=11.0)
    assert remaining.update(4, now=21.0) == pytest.approx(96 * 10.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3675, "1:01:15"), (90061, "1d 01:01:01"), (59.7, "1:00")]
)
def test_durations_read_as_clock_times(seconds, text):
    assert format_duration(seconds) == text


def test_progress_prints_rate_and_time_left_but_not_at_every_item():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("tokenize", total=40, unit="docs", interval_s=1.0, stream=stream, clock=clock)
    for _ in range(10):
        clock.now += 0.25
        progress.advance()
    assert stream.getvalue().splitlines() == [
        "tokenize:  10% (4/40 docs) 4.0 docs/s, 0:09 left",
        "tokenize:  20% (8/40 docs) 4.0 docs/s, 0:08 left",
    ]
    progress.close()
    assert stream.getvalue().splitlines()[-1] == "tokenize: 10 docs in 0:02 (4.0 docs/s)"


def test_progress_tracks_an_iterable_of_unknown_length():
    clock, stream = Clock(), io.StringIO()
    seen = list(Progress("read", None, unit="lines", interval_s=0.0, stream=stream, clock=clock).track(iter("ab")))
    assert seen == ["a", "b"]
    assert stream.getvalue().splitlines()[1].startswith("read: 2 lines")


def test_timers_sum_a_part_and_start_anew_after_pop():
    clock, waits = Clock(), []
    timers = Timers(synchronize=lambda: waits.append(clock.now), clock=clock)
    for seconds in (1.0, 2.0):
        with timers("rollout"):
            clock.now += seconds
    timers.add("judge", 0.5)
    assert timers.pop() == {"timing/rollout_s": 3.0, "timing/judge_s": 0.5}
    assert timers.pop() == {}
    assert waits == [100.0, 101.0, 101.0, 103.0]


def test_a_timer_counts_a_part_that_raised():
    clock = Clock()
    timers = Timers(clock=clock)
    with pytest.raises(KeyError), timers("train"):
        clock.now += 4.0
        raise KeyError("x")
    assert timers.pop() == {"timing/train_s": 4.0}


def test_throughput_by_hand():
    # 6 * 100 + 12 * 2 * 5 * 10 = 1800 operations per token.
    flops = training_flops_per_token(num_parameters=100, num_layers=2, hidden_size=5, context=10)
    assert flops == 1800
    # 5e9 tokens in 10 s on 3 devices: 5e8 * 1800 / 3 = 0.3e12 per device; of a peak of 1.2 TFLOP/s that is a quarter.
    scalars = throughput_scalars(5_000_000_000, 10.0, flops, num_devices=3, peak_tflops=1.2)
    assert scalars == pytest.approx({"tokens_per_s": 5e8, "throughput": 0.3, "mfu": 0.25})
    assert "mfu" not in throughput_scalars(1, 1.0, flops, 1, None)
