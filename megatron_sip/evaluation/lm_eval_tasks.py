"""The paper's eight standard tasks by their names in lm-evaluation-harness, and the plain mean over tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER_TASKS: Mapping[str, int] = {
    "boolq": 0,
    "piqa": 0,
    "social_iqa": 0,
    "hellaswag": 0,
    "arc_easy": 0,
    "arc_challenge": 0,
    "openbookqa": 0,
    "mmlu": 5,
}
"""Task -> examples in the prompt."""

METRICS = ("acc", "acc_norm")
"""The paper does not say which of the two it takes where a task has both, so both means are given."""


def score_of(values: Mapping[str, Any], metric: str) -> float | None:
    """A task's score; for ``acc_norm`` (by length of the answers) its ``acc`` where it has no other."""
    for name in (metric, "acc"):
        if isinstance(values.get(f"{name},none"), float | int):
            return float(values[f"{name},none"])
    return None


def means(results: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
    """The plain mean over tasks that have a score; None if none has."""
    scores = [score for values in results.values() if (score := score_of(values, metric)) is not None]
    return sum(scores) / len(scores) if scores else None


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per task and one for the mean; tasks without accuracy are listed with all they measure."""
    lines = [f"{'task':<24}" + "".join(f"{metric:>10}" for metric in METRICS)]
    for task, values in results.items():
        scores = [score_of(values, metric) for metric in METRICS]
        if scores[0] is None:
            measured = {k.partition(",")[0]: v for k, v in values.items() if isinstance(v, float) and "stderr" not in k}
            lines.append(f"{task:<24}  " + "  ".join(f"{name} {value:.6g}" for name, value in measured.items()))
        else:
            lines.append(f"{task:<24}" + "".join(f"{score:>10.4f}" for score in scores))
    averages = [means(results, metric) for metric in METRICS]
    if averages[0] is not None:
        lines.append(f"{'mean':<24}" + "".join(f"{average:>10.4f}" for average in averages))
    return "\n".join(lines)
