"""Forward passes through the pipeline's stages, outside of Megatron's training schedules.

B  batch of a pass    S  its sequence width    H  hidden size    v  vocabulary columns of this rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import ConfigurationError
from megatron_sip.model import NextLogits, PolicyModel
from megatron_sip.rollout.config import gathers_weights
from megatron_sip.rollout.lean import LeanStage
from megatron_sip.rollout.weights import gather_weights, is_known_architecture, own_weights, whole_model_bytes
from megatron_sip.types import AttentionPlan


class StageChain:
    """This rank's part of the model: receives hidden states, runs its chunks, sends on.

    Sends do not wait, so that several passes can be under way, each at another stage; all ranks of a pipeline start the
    same passes in the same order. With gathered weights every tensor-parallel rank has a pipeline of its own.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], context: ParallelContext, weights: str) -> None:
        """``chunks``: the virtual stages of this rank in order, with or without DDP around them; ``weights``: "auto",
        "sharded" or "gathered" (see RolloutConfig).

        Raises:
            ConfigurationError: weights are to be gathered that only the modules themselves can compute with.
        """
        self._chunks = [_unwrap(chunk) for chunk in chunks]
        self._context = context
        known = all(is_known_architecture(chunk) for chunk in self._chunks)
        if weights == "gathered" and not known:
            raise ConfigurationError(
                "--rollout-weights gathered knows only the layers of --transformer-impl local: choose that, or sharded."
            )
        self.gathered = known and gathers_weights(weights, whole_model_bytes(self._chunks[0]), context.tp_size)
        """Whether each tensor-parallel rank decodes rows of its own with the whole weights."""
        self._by_modules = not known
        config = self._chunks[0].config
        self._hidden_size = config.hidden_size
        self._hidden_dtype = config.pipeline_dtype or config.params_dtype
        self._sequence_split = context.tp_size if config.sequence_parallel and self._by_modules else 1
        self._unsent: list[tuple[dist.Work, torch.Tensor]] = []
        self._lean: list[LeanStage] = []

    @property
    def num_in_flight(self) -> int:
        """Passes that keep all stages busy. With virtual stages one: a rank sends and receives to the same peer then,
        and NCCL pairs these by their order."""
        return self._context.pp_size if len(self._chunks) == 1 else 1

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self._context.is_last_stage

    @property
    def is_alone(self) -> bool:
        """Whether nothing is sent between stages."""
        return self._context.pp_size == 1

    @property
    def is_capturable(self) -> bool:
        """Whether a pass is always the same kernels: Megatron's modules may decide on the host, sends have peers."""
        return self.is_alone and not self._by_modules

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout, no recomputation inside; the weights are those of the moment of entry."""
        training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        try:
            with torch.no_grad(), nullcontext() if self._by_modules else torch._C.DisableTorchFunction():
                # Our passes ask for no "cuda": without the CPU platform's look at every tensor call they are faster.
                if not self._by_modules:
                    self._lean = [self._lean_stage(chunk) for chunk in self._chunks]
                yield
        finally:
            self._lean = []
            for chunk, flag in zip(self._chunks, training, strict=True):
                chunk.train(flag)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, asked: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Tokens and positions int64 [B, S] -> logits of the last stage, None on the others.

        ``asked``: int64 [B], the one position of each row whose next-token logits are wanted, [B, v]; None for those of
        all positions of the only row, [S, v].
        """
        if self._by_modules:
            return self._forward_modules(tokens, positions, plan, asked)
        rotation = self._lean[0].rotation(positions)
        shape = (tokens.shape[1], tokens.shape[0], self._hidden_size)
        for index, stage in enumerate(self._lean):
            hidden = stage.embed(tokens) if self._is_start(index) else self._receive(shape)
            hidden = stage.layers(hidden, rotation, plan)
            if self._is_end(index):
                rows = torch.arange(len(tokens), device=tokens.device)
                return stage.logits(hidden[:, 0] if asked is None else hidden[asked, rows])
            self._send(hidden)
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

    def _lean_stage(self, chunk: PolicyModel) -> LeanStage:
        weights = own_weights(chunk)
        if self.gathered:
            weights = gather_weights(weights, self._context.tp_group)
        split = self._context.tp_size > 1 and not self.gathered
        return LeanStage(weights, chunk.config, chunk.rotary_frequencies, self._context.tp_group if split else None)

    def _forward_modules(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, asked: torch.Tensor | None
    ) -> torch.Tensor | None:
        width = tokens.shape[1]
        sources = torch.arange(width, device=tokens.device)[None] if asked is None else asked[:, None]
        padding = -width % self._sequence_split
        if padding:
            tokens, positions = (torch.nn.functional.pad(part, (0, padding)) for part in (tokens, positions))
        shape = ((width + padding) // self._sequence_split, len(tokens), self._hidden_size)
        for index, chunk in enumerate(self._chunks):
            if not self._is_start(index):
                chunk.set_input_tensor(self._receive(shape))
            result = chunk(tokens, positions, plan, NextLogits(sources))
            if self._is_end(index):
                return result.flatten(0, 1)
            self._send(result)
        return None

    def _is_start(self, chunk: int) -> bool:
        return chunk == 0 and self._context.is_first_stage

    def _is_end(self, chunk: int) -> bool:
        return chunk == len(self._chunks) - 1 and self._context.is_last_stage

    def _peer(self, distance: int) -> int:
        return dist.get_global_rank(self._context.pp_group, (self._context.pp_rank + distance) % self._context.pp_size)

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
