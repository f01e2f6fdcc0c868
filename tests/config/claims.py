"""What ranks are asked about the figures of --dry-run."""

from __future__ import annotations

from typing import Any

from megatron_sip.distributed import initialize
from megatron_sip.distributed.config import ParallelConfig
from megatron_sip.model import ModelConfig, build_model


def parameters_of_rank(payload: dict[str, Any]) -> tuple[int, int]:
    """(pipeline stage, parameters that this rank really has)."""
    context = initialize(ParallelConfig(**payload["parallel"]), seed=1)
    chunks = build_model(ModelConfig(**payload["model"]), payload["vocab_size"], context)
    count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    stage = context.pp_rank
    context.shutdown()
    return stage, count
