"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sip.curriculum import Curriculum, TriggerState
from megatron_sip.train.checks import uses_judge, uses_rewriter
from megatron_sip.train.config import TrainConfig

MOST_PASSES = 4.0
"""Up to here repeated text is about as good as new (Muennighoff et al. 2023, arXiv 2305.16264)."""
REPETITION = f"beyond about {MOST_PASSES:g} passes repeated text teaches less and less (arXiv 2305.16264)"
STREAM_NAMES = {"ntp": "next-token windows", "sip": "prefix-suffix samples"}


def passes_of(train_iters: int, curriculum: Curriculum, samples: Mapping[str, int]) -> dict[str, float]:
    """Passes over the corpus in the whole run; phases that wait are taken to open at the first moment.

    ``samples``: "ntp" windows and "sip" prefix-suffix samples of one pass, those that are known.
    """
    opened, start = dict[str, int](), 0
    for phase in curriculum.phases:
        opened[phase.name] = start
        start += phase.steps or 0
    trigger, consumed = TriggerState(opened), {"ntp": 0, "sip": 0}
    for step in range(train_iters):
        for stream, count in curriculum.plan(step, trigger).counts.items():
            consumed["ntp" if stream == "ntp" else "sip"] += count
    return {name: consumed[name] / length for name, length in samples.items()}


def repetition(passes: Mapping[str, float], samples: Mapping[str, int]) -> str:
    """One line if the corpus is passed through too often, else ""."""
    often = [f"{passes[name]:.1f} passes over {samples[name]:,} {STREAM_NAMES[name]}" for name in passes
             if passes[name] > MOST_PASSES]  # fmt: skip
    if not often:
        return ""
    return f"{' and '.join(often)}: {REPETITION}; give more text, or fewer --train-iters"


def start_line(config: TrainConfig, curriculum: Curriculum, layout: tuple[int, int, int], num_parameters: int) -> str:
    """Size, ``layout`` (TP, PP, DP), teacher and phases in one line."""
    tp, pp, dp = layout
    ranks = tp * pp * dp
    phases = ", ".join(
        f"{phase.name} ({f'{phase.steps:,} steps' if phase.steps is not None else 'to the end'})"
        for phase in curriculum.phases
    )
    return (
        f"training {num_parameters:,} parameters for {config.training.train_iters:,} steps on {ranks:,} "
        f"rank{'s' * (ranks > 1)} (TP {tp} x PP {pp} x DP {dp}); teacher: {_teacher(config)}; phases: {phases}"
    )


def _teacher(config: TrainConfig) -> str:
    teacher = config.teacher
    if not (uses_judge(config) or uses_rewriter(config)):
        return "none"
    if teacher.replay_judgments:
        return f"a replay of {teacher.replay_judgments}"
    if not teacher.http_roles(uses_judge(config), uses_rewriter(config)):
        return teacher.teacher
    number = len(teacher.judge_endpoints)
    return f"{teacher.judge_served_model} over HTTP, {number} endpoint{'s' * (number != 1)}"
