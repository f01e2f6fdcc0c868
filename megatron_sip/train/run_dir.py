"""What a run's folder holds unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from pathlib import Path

from megatron_sip.checkpoint.config import CheckpointConfig
from megatron_sip.observability.config import ObservabilityConfig


def in_run_dir(
    checkpoint: CheckpointConfig, observability: ObservabilityConfig, given: Set[str]
) -> tuple[CheckpointConfig, ObservabilityConfig]:
    """With --run-dir, what is not ``given`` is in it: checkpoints, saved and resumed from, and TensorBoard's events."""
    if observability.run_dir is None:
        return checkpoint, observability
    run_dir = Path(observability.run_dir)
    if "save" not in given:
        checkpoint = replace(checkpoint, save=str(run_dir / "checkpoints"))
    if "load" not in given:
        checkpoint = replace(checkpoint, load=str(run_dir / "checkpoints"))
    if "tensorboard_dir" not in given:
        observability = replace(observability, tensorboard_dir=str(run_dir / "tensorboard"))
    return checkpoint, observability
