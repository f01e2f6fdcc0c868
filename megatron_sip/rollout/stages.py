"""One forward pass through the pipeline's stages, outside of Megatron's training schedules.

S  sequence width of the pass      B  its batch      H  hidden size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_sip.distributed import ParallelContext
from megatron_sip.model import NextLogits, PolicyModel
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

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, output: NextLogits
    ) -> torch.Tensor | None:
        """tokens and positions int64 [B, S] -> logits [B, L, V / tp] on the last stage, None elsewhere."""
        context = self._context
        for index, chunk in enumerate(self._chunks):
            if index > 0 or not context.is_first_stage:
                chunk.set_input_tensor(self._receive(tokens.shape[1], tokens.shape[0]))
            result = chunk(tokens, positions, plan, output)
            if context.is_last_stage and index == len(self._chunks) - 1:
                return result
            self._send(result)
        return None

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

    def _receive(self, width: int, batch: int) -> torch.Tensor:
        shape = (width // self._sequence_split, batch, self._hidden_size)
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
