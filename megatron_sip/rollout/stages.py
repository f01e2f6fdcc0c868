"""One forward pass through the pipeline's stages, outside of Megatron's training schedules.

S  sequence width of the pass    B  its batch    H  hidden size    R  rows of a decode step
L  positions whose logits are asked for           v  vocabulary columns of this rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_sip.distributed import ParallelContext
from megatron_sip.model import NextLogits, PolicyModel
from megatron_sip.rollout.lean import LeanStage, supports_lean_decode
from megatron_sip.types import AttentionPlan


class StageChain:
    """This rank's part of the model: receives hidden states, runs its chunks, sends on.

    Sends do not wait, so that several passes can be under way, each at another stage; all ranks of a pipeline start the
    same passes in the same order.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], context: ParallelContext) -> None:
        """``chunks``: the virtual stages of this rank in order, with or without wrappers (DDP, Float16Module)."""
        self._chunks = [_unwrap(chunk) for chunk in chunks]
        self._context = context
        config = self._chunks[0].config
        self._hidden_size = config.hidden_size
        self._hidden_dtype = config.pipeline_dtype or config.params_dtype
        self._sequence_split = context.tp_size if config.sequence_parallel else 1
        self._unsent: list[tuple[dist.Work, torch.Tensor]] = []
        self._lean = (
            [LeanStage(chunk, context.tp_group, context.tp_size) for chunk in self._chunks]
            if all(supports_lean_decode(chunk) for chunk in self._chunks)
            else None
        )

    @property
    def num_in_flight(self) -> int:
        """Passes that keep all stages busy. With virtual stages one: a rank sends and receives to the same peer then,
        and NCCL pairs these by their order."""
        return self._context.pp_size if len(self._chunks) == 1 else 1

    @property
    def sequence_multiple(self) -> int:
        """Sequence widths must be a multiple of this."""
        return self._sequence_split

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout, no recomputation inside."""
        training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk, flag in zip(self._chunks, training, strict=True):
                chunk.train(flag)

    def prefill(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, output: NextLogits
    ) -> torch.Tensor | None:
        """tokens and positions int64 [B, S] -> logits [B, L, v] on the last stage, None elsewhere."""
        for index, chunk in enumerate(self._chunks):
            if not self._is_start(index):
                width = tokens.shape[1] // self._sequence_split
                chunk.set_input_tensor(self._receive((width, tokens.shape[0], self._hidden_size)))
            result = chunk(tokens, positions, plan, output)
            if self._is_end(index):
                return result
            self._send(result)
        return None

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan) -> torch.Tensor | None:
        """One token per row, int64 [R] -> logits [R, v] on the last stage, None elsewhere.

        The plan sees the rows as the sequence dimension: queries [R or more, 1, h, d].
        """
        if self._lean is None:
            return self._decode_by_modules(tokens, positions, plan)
        rotation = self._lean[0].rotation(positions)
        for index, stage in enumerate(self._lean):
            hidden = stage.embed(tokens) if self._is_start(index) else self._receive((len(tokens), self._hidden_size))
            hidden = stage.layers(hidden, rotation, plan)
            if self._is_end(index):
                return stage.logits(hidden)
            self._send(hidden)
        return None

    def _decode_by_modules(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor | None:
        sources = torch.arange(len(tokens), device=tokens.device)
        padding = -len(tokens) % self._sequence_split
        if padding:
            tokens, positions = (torch.nn.functional.pad(part, (0, padding)) for part in (tokens, positions))
        logits = self.prefill(tokens[None], positions[None], plan, NextLogits(sources[None]))
        return None if logits is None else logits[0]

    def broadcast_from_last(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` of the last stage, in place, on all stages."""
        if self._context.pp_size > 1:
            group = self._context.pp_group
            dist.broadcast(values, src=dist.get_global_rank(group, self._context.pp_size - 1), group=group)
        return values

    def finish(self) -> None:
        """Waits until everything sent has arrived."""
        for work, _ in self._unsent:
            work.wait()
        self._unsent.clear()

    def _peer(self, distance: int) -> int:
        return dist.get_global_rank(self._context.pp_group, (self._context.pp_rank + distance) % self._context.pp_size)

    def _is_start(self, chunk: int) -> bool:
        return chunk == 0 and self._context.is_first_stage

    def _is_end(self, chunk: int) -> bool:
        return chunk == len(self._chunks) - 1 and self._context.is_last_stage

    def _receive(self, shape: tuple[int, ...]) -> torch.Tensor:
        hidden = torch.empty(shape, dtype=self._hidden_dtype, device=self._context.device)
        dist.recv(hidden, src=self._peer(-1), group=self._context.pp_group)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        while len(self._unsent) > self.num_in_flight:
            self._unsent.pop(0)[0].wait()
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dst=self._peer(1), group=self._context.pp_group)
        assert work is not None
        self._unsent.append((work, hidden))  # the tensor must outlive the transfer


def _unwrap(module: torch.nn.Module) -> PolicyModel:
    while not isinstance(module, PolicyModel):
        inner = getattr(module, "module", None)
        assert isinstance(inner, torch.nn.Module), f"no PolicyModel inside {type(module).__name__}"
        module = inner
    return module
