"""Log-probs of given tokens under a policy spread over tensor- and pipeline-parallel ranks, for evaluation.

B  rows of a batch    S  their width    L  scored positions of a row    V  vocabulary    H  hidden size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_sip.distributed import ParallelContext
from megatron_sip.model import (
    CausalPlan,
    NextLogits,
    PolicyModel,
    ScoreTargets,
    vocab_parallel_log_probs,
    without_sequence_parallel,
)
from megatron_sip.model.outputs import ModelOutput


class PolicyScorer:
    """Forward passes without gradients; every rank of a replica calls each method with equal arguments.

    Args:
        chunks: as from ``build_model``.
        context: of the job.
        vocab_size: tokens, without padding.
    """

    def __init__(self, chunks: Sequence[PolicyModel], context: ParallelContext, vocab_size: int) -> None:
        self._chunks = chunks
        self._context = context
        self._vocab_size = vocab_size

    def log_probs(self, tokens: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [B, S], targets and sources as in ``ScoreTargets`` [B, L] -> float32 [B, L] on all ranks."""
        targets, sources = targets.to(self._context.device), sources.to(self._context.device)
        scores = self._forward(tokens, ScoreTargets(targets, sources))
        if scores is None:
            scores = torch.empty(sources.shape, dtype=torch.float32, device=self._context.device)
        return self._from_last_stage(scores.contiguous())

    def continuations(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, with_best: bool
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): its log-prob, and whether each token of it is the most likely one.

        Contexts lose their beginning where a pair is longer than ``max_length`` + 1 tokens; a continuation must not be.
        Without ``with_best`` the second is False, and no row of logits is kept.
        """
        rows = [[*context, *continuation][-(max_length + 1) :] for context, continuation in pairs]
        lengths = [len(continuation) for _, continuation in pairs]
        tokens = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        sources = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        targets = torch.zeros_like(sources)
        real = torch.zeros_like(sources, dtype=torch.bool)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[number, : len(row) - 1] = torch.tensor(row[:-1])
            sources[number, :length] = torch.arange(len(row) - 1 - length, len(row) - 1)
            targets[number, :length] = torch.tensor(row[len(row) - length :])
            real[number, :length] = True
        if with_best:
            log_probs, best = self.log_probs_and_best(tokens, targets, sources)
        else:
            log_probs, best = self.log_probs(tokens, targets, sources), torch.full_like(targets, -1)
        sums = (log_probs.double() * real).sum(dim=1)
        greedy = ((best == targets) | ~real).all(dim=1)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def log_probs_and_best(
        self, tokens: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``log_probs``, and the most likely token after each source, the lowest id of equals: int64 [B, L]."""
        sources, targets = sources.to(self._context.device), targets.to(self._context.device)
        logits = self._forward(tokens, NextLogits(sources))
        if logits is None:
            best = torch.empty(sources.shape, dtype=torch.int64, device=self._context.device)
            scores = torch.empty(sources.shape, dtype=torch.float32, device=self._context.device)
        else:
            best = self._best(logits)
            scores = vocab_parallel_log_probs(logits, targets, self._vocab_size, self._context.tp_group)
        return self._from_last_stage(scores.contiguous()), self._from_last_stage(best)

    def logits(self, tokens: torch.Tensor, sources: torch.Tensor) -> torch.Tensor | None:
        """The whole rows of logits, float32 [B, L, V], on the last stage; None on the others."""
        logits = self._forward(tokens, NextLogits(sources.to(self._context.device)))
        if logits is None:
            return None
        parts = [torch.empty_like(logits) for _ in range(self._context.tp_size)]
        dist.all_gather(parts, logits.contiguous(), group=self._context.tp_group)
        return torch.cat(parts, dim=-1)[..., : self._vocab_size]

    def _best(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V / tp] -> the index of the largest of all ranks."""
        value, index = logits.max(dim=-1)
        largest = value.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._context.tp_group)
        index = index + self._context.tp_rank * logits.shape[-1]
        index = torch.where(value == largest, index, torch.iinfo(torch.int64).max)
        dist.all_reduce(index, op=dist.ReduceOp.MIN, group=self._context.tp_group)
        return index

    def _forward(self, tokens: torch.Tensor, output: ModelOutput) -> torch.Tensor | None:
        tokens = tokens.to(self._context.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        try:
            with torch.no_grad(), without_sequence_parallel(self._chunks):
                return self._through_stages(tokens, positions, output)
        finally:
            for chunk, flag in zip(self._chunks, training, strict=True):
                chunk.train(flag)

    def _through_stages(
        self, tokens: torch.Tensor, positions: torch.Tensor, output: ModelOutput
    ) -> torch.Tensor | None:
        config = self._chunks[0].config
        shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
        plan = CausalPlan()  # rows are padded at the right, out of sight of what is scored
        for index, chunk in enumerate(self._chunks):
            if not (index == 0 and self._context.is_first_stage):
                dtype = config.pipeline_dtype or config.params_dtype
                hidden = torch.empty(shape, dtype=dtype, device=self._context.device)
                dist.recv(hidden, src=self._peer(-1), group=self._context.pp_group)
                chunk.set_input_tensor(hidden)
            result = chunk(tokens, positions, plan, output)
            if index == len(self._chunks) - 1 and self._context.is_last_stage:
                return result
            dist.send(result.contiguous(), dst=self._peer(1), group=self._context.pp_group)
        return None

    def _peer(self, distance: int) -> int:
        stage = (self._context.pp_rank + distance) % self._context.pp_size
        return dist.get_global_rank(self._context.pp_group, stage)

    def _from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        if self._context.pp_size > 1:
            group = self._context.pp_group
            dist.broadcast(values, src=dist.get_global_rank(group, self._context.pp_size - 1), group=group)
        return values.cpu()


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences, the longest first, in batches of at most ``batch_tokens`` with padding (or of one)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
