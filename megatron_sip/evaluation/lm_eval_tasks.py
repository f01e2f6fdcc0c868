"""The paper's eight standard tasks by their names in lm-evaluation-harness, and the plain mean over tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sip.errors import ConfigurationError

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


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how much of them."""

    tasks: str = "paper"
    """Names, separated by commas; ``paper`` is the paper's eight."""
    include_path: str | None = None
    """Folder with task files of one's own: with local data they need no network."""
    num_fewshot: int | None = None
    """Examples in the prompt, in place of the task's."""
    limit: int | None = None
    """Documents per task."""

    @property
    def num_examples(self) -> Mapping[str, int | None]:
        """Task -> examples in the prompt; None: as the task says."""
        names: Mapping[str, int | None] = (
            PAPER_TASKS if self.tasks == "paper" else {name: None for name in self.tasks.split(",")}
        )
        return names if self.num_fewshot is None else dict.fromkeys(names, self.num_fewshot)


def run_tasks(model: Any, options: TaskOptions, model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Task -> what the harness measured; nothing on a rank that is not the first of its node.

    Args:
        model: an ``LM`` of the harness, or the name of one of its own.
        options: the tasks.
        model_args: of a model that is named.

    Raises:
        ConfigurationError: the harness knows no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include_path)
    wanted = options.num_examples
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise ConfigurationError(
            f"lm-evaluation-harness has no task {unknown[0]!r}: correct --tasks, or name the folder of its file with "
            "--include-path"
        )
    results: dict[str, Any] = {}
    for name, num_examples in wanted.items():
        found = simple_evaluate(
            model=model,
            model_args=None if model_args is None else dict(model_args),
            tasks=[name],
            num_fewshot=num_examples,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
        if found is None:  # what the harness gives to all ranks of a node but the first
            continue
        results.update({task: values for task, values in found["results"].items() if task in wanted})
    return results


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
