"""The policy's weights under transformers' names, from whatever layout they are trained at.

Reads what a checkpoint is written from (``sharded_state_dict``), so that there is one account of which rank holds what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel

from megatron_sip.distributed import ParallelContext
from megatron_sip.huggingface.correspondence import EMBEDDING, LM_HEAD, Piece, pieces
from megatron_sip.huggingface.safetensors_files import Plan
from megatron_sip.model.presets import Architecture

_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False}


class StageWeights:
    """The tensors of this rank's pipeline stage.

    Args:
        chunks: as from ``build_model``, with or without DDP around them.
        context: of the job.
        architecture: of the model.
        vocab_size: the tokenizer's; the padding that tensor parallelism adds is left out.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], context: ParallelContext, architecture: Architecture, vocab_size: int
    ) -> None:
        self._chunks = chunks
        self._context = context
        self.is_tied = not architecture.untie_embeddings_and_output_weights
        """Whether embedding and output layer are one."""
        self._pieces: dict[tuple[str, int | None], list[Piece]] = {}
        for piece in pieces(architecture, vocab_size):
            self._pieces.setdefault((piece.key, piece.layer), []).append(piece)

    def complete(self) -> None:
        """Finishes a parameter gather that was left to the next forward pass. Collective over data parallel."""
        complete_parameter_gather(self._chunks)

    def plan(self) -> Plan:
        """Type and shape of each of the stage's tensors, in the order of iteration."""
        shards = list(self._shards())
        return {name: (shard.data.dtype, shape) for shard, piece in shards for name, shape in self._sources(piece)}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors, one at a time, on all tensor-parallel ranks, which iterate together."""
        for shard, piece in self._shards():
            whole = self._whole(shard, piece)
            parts = piece.split(whole)
            for index, (name, _) in enumerate(self._sources(piece)):
                yield name, parts[min(index, len(parts) - 1)]

    def _sources(self, piece: Piece) -> Sequence[tuple[str, tuple[int, ...]]]:
        """A tied output layer is named too: servers of an untied copy need it, others skip it."""
        if self.is_tied and piece.key == EMBEDDING:
            return (*piece.sources, (LM_HEAD, piece.shape))
        return piece.sources

    def _shards(self) -> Iterator[tuple[ShardedTensor, Piece]]:
        for chunk in self._chunks:
            module: Any = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
            for value in nested_values(module.sharded_state_dict(metadata=dict(_FORMAT))):
                parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
                for part in parts:
                    if isinstance(part, ShardedTensor) and not self._is_copy_of_embedding(part):
                        yield part, self._piece(part)

    def _is_copy_of_embedding(self, shard: ShardedTensor) -> bool:
        """A tied output layer on a last stage of its own."""
        return bool(shard.key == EMBEDDING) and not self._context.is_first_stage

    def _piece(self, shard: ShardedTensor) -> Piece:
        layer, first_row = None, shard.global_offset[0]
        if shard.prepend_axis_num:
            layer, first_row = shard.global_offset[:2]
        candidates = self._pieces[shard.key, layer]
        if len(candidates) == 1:
            return candidates[0]
        return next(p for p in candidates if p.first_row <= first_row < p.first_row + p.shape[0])

    def _whole(self, shard: ShardedTensor, piece: Piece) -> torch.Tensor:
        local = shard.data.detach()
        whole = (
            shard.global_shape if piece.layer is None else piece.shape
        )  # the former has the padding of the vocabulary
        axis = next((a for a, (n, m) in enumerate(zip(local.shape, whole, strict=True)) if n != m), None)
        if axis is not None:
            parts = [torch.empty_like(local) for _ in range(self._context.tp_size)]
            dist.all_gather(parts, local.contiguous(), group=self._context.tp_group)
            local = torch.cat(parts, dim=axis)
        return local[: piece.shape[0]]


def complete_parameter_gather(chunks: Sequence[torch.nn.Module]) -> None:
    """Finishes what an optimizer step with ``overlap_param_gather`` left to the next forward pass of the modules."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
