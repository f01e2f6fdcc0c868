"""Prefixes with their candidates, scores and what was chosen, recorded as text for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.observability.jsonl import StepLines
from megatron_sip.types import IntArray, Preference

SAMPLES_FILE = "samples.jsonl"
MAX_PREFIX_CHARACTERS = 1500
"""What is recorded of a prefix is its end: that is what a continuation goes on from."""


class SampleLog:
    """Writes ``samples.jsonl`` in ``run_dir`` (None: writes nothing). ``resume_step`` is as in ``MetricsLog``."""

    def __init__(self, run_dir: str | None, decode: Callable[[IntArray], str], resume_step: int = 0) -> None:
        self._decode = decode
        self._lines: StepLines | None = None
        if run_dir is not None:
            self._lines = StepLines(Path(run_dir) / SAMPLES_FILE)
            self._lines.drop_after(resume_step)

    def log(self, step: int, preferences: Sequence[Preference]) -> None:
        """Record each preference as one line."""
        if self._lines is None:
            return
        for preference in preferences:
            self._lines.append(sample_record(step, preference, self._decode))

    def close(self) -> None:
        """Flush and close the file."""
        if self._lines is not None:
            self._lines.close()


def sample_record(step: int, preference: Preference, decode: Callable[[IntArray], str]) -> dict[str, Any]:
    """One line of ``samples.jsonl``. A score that is missing is NaN here and null in the file."""
    sample, judgment = preference.group.sample, preference.judgment
    candidates = []
    for index, candidate in enumerate(preference.group.candidates):
        candidates.append(
            {
                "kind": candidate.kind.value,
                "rollout": candidate.rollout,
                "num_tokens": len(candidate.tokens),
                "text": decode(candidate.tokens),
                "score": None if judgment is None else float(judgment.scores[index]),
                "criteria": {}
                if judgment is None
                else {name: float(scores[index]) for name, scores in judgment.criteria.items()},
                "chosen": index == preference.chosen,
                "rejected": index == preference.rejected,
            }
        )
    return {
        "step": step,
        "sample_id": sample.sample_id,
        "document": sample.document,
        "num_prefix_tokens": len(sample.prefix),
        "prefix": decode(sample.prefix)[-MAX_PREFIX_CHARACTERS:],
        "candidates": candidates,
        "weight": preference.weight,
        "reason": preference.reason,
    }
