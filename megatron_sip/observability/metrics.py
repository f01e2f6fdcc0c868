"""One record of scalars per step, as a JSON line and as TensorBoard events under the same names.

The names are Megatron-LM's where it has one (``lm loss``, ``grad-norm``), TRL's for DPO (``rewards/margins``),
and ``sip/``, ``judge/``, ``rollout/``, ``policy/``, ``timing/`` for what is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sip.observability.jsonl import StepLines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
CONSUMED_SAMPLES = "consumed-samples"

NAMES_VS_SAMPLES = (
    "lm loss",
    "lm loss validation",
    "learning-rate",
    "batch-size",
    "grad-norm",
    "params-norm",
    "loss-scale",
    "throughput",
    "sip/chosen_rate/suffix",
    "sip/chosen_rate/rewrite",
    "sip/chosen_rate/rollout",
)
"""Scalars that TensorBoard also gets over consumed samples, as Megatron-LM's "... vs samples"."""


class MetricsLog:
    """Writes ``metrics.jsonl`` in ``run_dir`` and TensorBoard events in ``tensorboard_dir``.

    Either may be None; with both None nothing is written, which is what every rank but one asks for. ``resume_step`` is
    the last step of the checkpoint that a run goes on from (0 for a new run): what an earlier run wrote beyond it is
    dropped, since those steps are about to be done again.
    """

    def __init__(self, run_dir: str | None, tensorboard_dir: str | None = None, resume_step: int = 0) -> None:
        self._last_step = resume_step
        self._lines: StepLines | None = None
        self._writer: SummaryWriter | None = None
        if run_dir is not None:
            self._lines = StepLines(Path(run_dir) / METRICS_FILE)
            self._lines.drop_after(resume_step)
        if tensorboard_dir is not None:
            # Imported here because it takes a second, and most ranks write no events.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(tensorboard_dir, purge_step=resume_step + 1)

    def log(
        self,
        step: int,
        scalars: Mapping[str, float],
        samples_consumed: int | None = None,
        labels: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a step, numbered from 1; once per step and in order.

        ``labels`` go to the JSON line alone: ``phase`` (name of the curriculum's phase) and ``alarms`` (list of
        messages) are the ones that the report shows.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}: log each step once, in order")
        self._last_step = step
        values = {name: float(value) for name, value in scalars.items()}
        if self._lines is not None:
            record: dict[str, Any] = {"step": step}
            if samples_consumed is not None:
                record[CONSUMED_SAMPLES] = samples_consumed
            self._lines.append({**record, **values, **(labels or {})})
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
                if samples_consumed is not None and name in NAMES_VS_SAMPLES:
                    self._writer.add_scalar(f"{name} vs samples", value, samples_consumed)

    def close(self) -> None:
        """Flush and close both."""
        if self._lines is not None:
            self._lines.close()
        if self._writer is not None:
            self._writer.close()
