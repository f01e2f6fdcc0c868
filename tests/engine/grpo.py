"""GRPO through the engine, and the same in plain PyTorch on separate sequences: three updates per batch of rollouts.

"Rollouts" are fixed tokens: sampling would turn rounding into other tokens. Old log-probs are the trainer's own, taken
before the first update of a batch, as a run takes them.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.model import ModelConfig, build_model
from megatron_sip.objectives import GRPO
from megatron_sip.types import RowBatch, RowLayout, TrainPass
from tests.engine.claims import start
from tests.engine.plain import llama
from tests.engine.rows import VOCAB, Row, draw_rows, micro_batches

LAYOUT = RowLayout(8, 3, 6)
NUM_UPDATES = 3


def advantages_of(step: int) -> list[list[float]]:
    """Of the four groups of a step."""
    drawn = np.random.default_rng([step, 77]).normal(size=(4, LAYOUT.num_candidates))
    return [[float(value) for value in row] for row in drawn.astype(np.float32)]


def groups_of(step: int) -> tuple[list[Row], list[list[float]]]:
    """Four groups, one of weight 0: its rewards had no spread."""
    rows = draw_rows(step, LAYOUT)
    return [replace(row, weight=float(number != 2)) for number, row in enumerate(rows)], advantages_of(step)


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Losses, metrics and gradient norms of every update, and log-probs of unseen rows at the end."""
    context, engine = start(payload)
    objective = GRPO(**payload["grpo"])
    history = []
    for step in range(payload["steps"]):
        batches = tuple(
            replace(batch, sampling_log_probs=old)
            for batch, old in _scored(engine, _batches(context, step, payload["micro_batch_size"]))
        )
        if objective.needs_reference:
            references = engine.score(batches, "reference")
            batches = tuple(
                replace(batch, reference_log_probs=scores) for batch, scores in zip(batches, references, strict=True)
            )
        units = context.sum_over_data_parallel({"units": sum(objective.units(b) for b in batches)})["units"]
        for _ in range(NUM_UPDATES):
            engine.begin_step()
            engine.run(TrainPass("grpo", batches, objective, 1.0 / units), last=True)
            metrics = {name: total / count for name, (total, count) in engine.collect_metrics().items()}
            history.append({**metrics, "grad-norm": engine.optimizer_step().grad_norm})
    probe = micro_batches(draw_rows(9, LAYOUT), LAYOUT, 1)
    scores = [(score * batch.mask).sum().item() for score, batch in zip(engine.score(probe), probe, strict=True)]
    return {"history": history, "params-norm": engine.parameter_norm(), "scores": scores}


def _scored(engine: Any, batches: tuple[RowBatch, ...]) -> list[tuple[RowBatch, torch.Tensor]]:
    return list(zip(batches, engine.score(batches), strict=True))


def _batches(context: ParallelContext, step: int, size: int) -> tuple[RowBatch, ...]:
    rows, advantages = groups_of(step)
    own = slice(context.dp_rank, None, context.dp_size)
    batches = micro_batches(rows[own], LAYOUT, size)
    values = torch.tensor(advantages[own]).split(size)
    return tuple(replace(batch, advantages=value) for batch, value in zip(batches, values, strict=True))


def train_plain(payload: dict[str, Any]) -> dict[str, Any]:
    """The same in plain PyTorch, for each of ``payload["variants"]``, by its name."""
    settings = ModelConfig(**payload["model"])
    (chunk,) = build_model(settings, VOCAB, initialize(ParallelConfig(), seed=payload["seed"]))
    return {
        name: _train_plain(llama(settings, dict(chunk.named_parameters())), payload, grpo)
        for name, grpo in payload["variants"].items()
    }


def _train_plain(policy: torch.nn.Module, payload: dict[str, Any], grpo: dict[str, Any]) -> dict[str, Any]:
    """transformers' Llama, one sequence after the other, ``torch.optim.AdamW`` and formulas written out."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    groups = [
        {"params": [p for p in policy.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in policy.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    history: list[dict[str, float]] = []
    for step in range(payload["steps"]):
        rows, advantages = groups_of(step)
        rollouts = [
            (row.prefix, continuation, advantage)
            for row, values in zip(rows, advantages, strict=True)
            for continuation, advantage in zip(row.continuations, values, strict=True)
            if row.weight
        ]
        with torch.no_grad():
            old = [_log_probs(policy, prefix, y) for prefix, y, _ in rollouts]
            kept = [_log_probs(reference, prefix, y) for prefix, y, _ in rollouts]
        for _ in range(NUM_UPDATES):
            loss = _loss(policy, rollouts, old, kept, **grpo)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = payload["lr"] * min(1.0, len(history) / 2)
            optimizer.step()
            history.append({"loss/grpo": float(loss), "grad-norm": float(norm)})
    squares = sum(float(p.detach().double().pow(2).sum()) for p in policy.parameters())
    with torch.no_grad():
        scores = [
            float(sum(_log_probs(policy, row.prefix, y).sum() for y in row.continuations))
            for row in draw_rows(9, LAYOUT)
        ]
    return {"history": history, "params-norm": squares**0.5, "scores": scores}


def _loss(
    policy: torch.nn.Module,
    rollouts: list[tuple[list[int], list[int], float]],
    old: list[torch.Tensor],
    kept: list[torch.Tensor],
    loss_mean: str,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
) -> torch.Tensor:
    sums, lengths = [], []
    for (prefix, continuation, advantage), before, anchor in zip(rollouts, old, kept, strict=True):
        now = _log_probs(policy, prefix, continuation)
        ratio = torch.exp(now - before)
        gain = torch.min(ratio * advantage, torch.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)
        sums.append((kl_weight * (torch.exp(anchor - now) + now - anchor - 1) - gain).sum())
        lengths.append(len(continuation))
    if loss_mean == "token":
        return torch.stack(sums).sum() / sum(lengths)
    if loss_mean == "constant":
        return torch.stack(sums).mean() / LAYOUT.candidate_block
    return torch.stack([total / length for total, length in zip(sums, lengths, strict=True)]).mean()


def _log_probs(model: torch.nn.Module, prefix: list[int], continuation: list[int]) -> torch.Tensor:
    tokens = torch.tensor([prefix + continuation])
    scores = model(tokens).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
    return scores.gather(1, torch.tensor(continuation).unsqueeze(1)).squeeze(1)
