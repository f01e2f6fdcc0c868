"""A freshly initialized model in one process, the yardstick for other layouts."""

from __future__ import annotations

import torch

from megatron_sip.distributed import ParallelConfig, initialize
from megatron_sip.model import CausalPlan, ModelConfig, NextLogits, build_model
from tests.model.reference import ARCHITECTURE, VOCAB_SIZE


def first_logits(tokens: list[list[int]]) -> list[list[float]]:
    """Logits of the first four positions of the first row, with another padding of the vocabulary."""
    context = initialize(ParallelConfig(), seed=5)
    config = ModelConfig(**{**ARCHITECTURE, "make_vocab_size_divisible_by": 100})
    chunk = build_model(config, VOCAB_SIZE, context)[0]
    rows = torch.tensor(tokens)[:1]
    positions = torch.arange(rows.shape[1])[None]
    with torch.no_grad():
        logits = chunk(rows, positions, CausalPlan(), NextLogits(torch.arange(4)[None]))
    assert logits.shape == (1, 4, 100)
    result: list[list[float]] = logits[0, :, :VOCAB_SIZE].tolist()
    return result
