"""What a run says before its first step: its size and layout, and whether its corpus is too small for it."""

from __future__ import annotations

from megatron_sip.curriculum import Curriculum, CurriculumConfig
from megatron_sip.train.config import train_config_from
from megatron_sip.train.start import passes_of, repetition, start_line

PHASES = [{"name": "warm-up", "ntp": 1.0, "steps": 10}, {"name": "rollouts", "ntp": 0.5, "rollout": 0.5}]


def curriculum() -> Curriculum:
    phases = CurriculumConfig(curriculum="ntp:10; ntp=0.5,rollout=0.5")
    return Curriculum(phases, 8, 1, {"default": 1, "ntp": 1})


def test_more_than_four_passes_are_a_warning_and_four_are_none() -> None:
    # 10 steps of 8 windows and 20 of 4; 20 of 4 judged samples.
    passes = passes_of(30, curriculum(), {"ntp": 40, "sip": 10})
    assert passes == {"ntp": (80 + 80) / 40, "sip": 8.0}
    assert repetition({"ntp": 4.0}, {"ntp": 40}) == ""
    line = repetition(passes, {"ntp": 40, "sip": 10})
    assert line.startswith("8.0 passes over 10 prefix-suffix samples: beyond about 4 passes") and "\n" not in line
    assert "197.0 passes over 61 next-token windows" in repetition({"ntp": 197.0}, {"ntp": 61})


def test_the_first_line_has_size_layout_teacher_and_phases() -> None:
    values = {
        "data_path": ["c"], "vocab_size": 60, "tokenizer_type": "NullTokenizer", "train_iters": 30, "seq_length": 256,
        "eval_iters": 0, "phases": PHASES, "candidates": "suffix,rollout:2",
    }  # fmt: skip
    judged = {"teacher": "http", "judge_endpoints": ["http://a:1/v1", "http://b:1/v1"], "judge_served_model": "m"}
    config = train_config_from({**values, **judged})
    line = start_line(config, curriculum(), (2, 1, 4), 2_150_592)
    assert line.startswith("training 2,150,592 parameters for 30 steps on 8 ranks (TP 2 x PP 1 x DP 4); ")
    assert "teacher: m over HTTP, 2 endpoints; phases: " in line and "(10 steps)" in line and "(to the end)" in line
