"""The metrics log: one JSON line a step, the same names in TensorBoard, and nothing twice after a resume."""

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sip.observability.jsonl import StepLines
from megatron_sip.observability.metrics import MetricsLog


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_one_json_line_with_tensorboard_names_as_keys(tmp_path):
    log = MetricsLog(str(tmp_path))
    log.log(1, {"lm loss": 9.5, "sip/chosen_rate/rollout": 0.25}, samples_consumed=16, labels={"phase": "warm-up"})
    # Read before close: each line is flushed when it is written.
    assert read_lines(tmp_path) == [
        {"step": 1, "consumed-samples": 16, "lm loss": 9.5, "sip/chosen_rate/rollout": 0.25, "phase": "warm-up"}
    ]


def test_nan_and_infinity_become_null(tmp_path):
    log = MetricsLog(str(tmp_path))
    log.log(1, {"grad-norm": math.inf, "lm loss": math.nan, "loss-scale": 1.0})
    assert read_lines(tmp_path) == [{"step": 1, "grad-norm": None, "lm loss": None, "loss-scale": 1.0}]


def test_resume_drops_what_the_earlier_run_wrote_beyond_the_checkpoint(tmp_path):
    first = MetricsLog(str(tmp_path))
    for step in (1, 2, 3, 4):
        first.log(step, {"lm loss": float(step)})
    first.close()
    resumed = MetricsLog(str(tmp_path), resume_step=2)
    resumed.log(3, {"lm loss": 30.0})
    assert [(line["step"], line["lm loss"]) for line in read_lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_drops_a_line_that_a_crash_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lm loss": 1.0}\n{"step": 2, "lm lo')
    MetricsLog(str(tmp_path), resume_step=2).log(3, {"lm loss": 3.0})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 3]


def test_a_step_logged_twice_or_out_of_order_is_refused(tmp_path):
    log = MetricsLog(str(tmp_path))
    log.log(2, {"lm loss": 1.0})
    with pytest.raises(ValueError, match="step 2 is logged after step 2"):
        log.log(2, {"lm loss": 1.0})


def test_a_rank_that_writes_nothing_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None, None)
    log.log(1, {"lm loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_values_and_twins_over_samples(tmp_path):
    log = MetricsLog(None, str(tmp_path))
    log.log(1, {"lm loss": 4.0, "judge/calls": 8.0}, samples_consumed=16)
    log.log(2, {"lm loss": 3.5, "judge/calls": 8.0}, samples_consumed=32)
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["judge/calls", "lm loss", "lm loss vs samples"]
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 4.0), (2, 3.5)]
    assert [(event.step, event.value) for event in events.Scalars("lm loss vs samples")] == [(16, 4.0), (32, 3.5)]


def test_tensorboard_hides_steps_beyond_the_checkpoint_after_a_resume(tmp_path):
    first = MetricsLog(None, str(tmp_path))
    for step in (1, 2, 3):
        first.log(step, {"lm loss": float(step)})
    first.close()
    resumed = MetricsLog(None, str(tmp_path), resume_step=2)
    resumed.log(3, {"lm loss": 30.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_full_disk_is_reported_with_the_file() -> None:
    full = StepLines(Path("/dev/full"))
    full._stream = full.path.open("w")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        full.append({"step": 1})
    with suppress(OSError):  # what is left in the buffer
        full.close()
