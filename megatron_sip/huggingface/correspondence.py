"""Which tensors of transformers' Llama and Qwen make up which tensors of a Megatron checkpoint.

L layers    H hidden    h query heads    g key-value groups    d head width    F feed-forward width    V vocabulary rows

Megatron's checkpoints stack the layers' tensors along a first axis of length L, at whatever layout they are written.
Queries, keys and values are one tensor, group by group: the h / g heads of queries of a group, its key, its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sip.model.presets import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
LM_HEAD = "lm_head.weight"
"""transformers' name of the output layer."""
_LAYERS = "decoder.layers."

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A part of one Megatron tensor and what it is called elsewhere."""

    key: str
    layer: int | None
    """Index along the first axis; None for a tensor that belongs to no layer."""
    first_row: int
    """Where it begins, along the first axis of the layer's own."""
    shape: Shape
    """Without the axis of layers."""
    sources: tuple[tuple[str, Shape], ...]
    """transformers' names and shapes: one, or queries, keys and values."""
    groups: int = 1
    """g where there are three sources."""

    @property
    def offsets(self) -> Shape:
        """Where it begins in the whole tensor."""
        return (*(() if self.layer is None else (self.layer,)), self.first_row, *([0] * (len(self.shape) - 1)))

    @property
    def sizes(self) -> Shape:
        """Its shape with the axis of layers."""
        return self.shape if self.layer is None else (1, *self.shape)

    def merge(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """transformers' tensors -> this piece."""
        if len(tensors) == 1:
            return tensors[0]
        grouped = [tensor.view(self.groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The reverse of ``merge``."""
        if len(self.sources) == 1:
            return [tensor]
        grouped = tensor.view(self.groups, -1, *tensor.shape[1:])
        widths = [shape[0] // self.groups for _, shape in self.sources]
        return [part.flatten(0, 1) for part in grouped.split(widths, dim=1)]


def pieces(architecture: Architecture, vocab_rows: int) -> list[Piece]:
    """All pieces of a model, in the order of transformers' own files."""
    a = architecture
    table = (vocab_rows, a.hidden_size)
    found = [_plain(EMBEDDING, None, "model.embed_tokens.weight", table)]
    for layer in range(a.num_layers):
        found += _attention(a, layer) + _mlp(a, layer)
    found.append(_plain("decoder.final_layernorm.weight", None, "model.norm.weight", (a.hidden_size,)))
    if a.untie_embeddings_and_output_weights:
        found.append(_plain(OUTPUT, None, LM_HEAD, table))
    return found


def whole_shapes(all_pieces: Sequence[Piece]) -> dict[str, Shape]:
    """Shapes of Megatron's whole tensors by key."""
    shapes: dict[str, Shape] = {}
    for piece in all_pieces:
        ends = tuple(a + n for a, n in zip(piece.offsets, piece.sizes, strict=True))
        before = shapes.get(piece.key, ends)
        shapes[piece.key] = tuple(max(a, b) for a, b in zip(before, ends, strict=True))
    return shapes


def _plain(key: str, layer: int | None, name: str, shape: Shape, first_row: int = 0) -> Piece:
    return Piece(key, layer, first_row, shape, ((name, shape),))


def _attention(a: Architecture, layer: int) -> list[Piece]:
    key, name = _LAYERS + "self_attention.", f"model.layers.{layer}."
    heads, width = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    rows = {"q": heads, "k": width, "v": width}

    def merged(kind: str, rest: Shape) -> Piece:
        sources = tuple((f"{name}self_attn.{x}_proj.{kind}", (n, *rest)) for x, n in rows.items())
        shape = (heads + 2 * width, *rest)
        return Piece(f"{key}linear_qkv.{kind}", layer, 0, shape, sources, a.num_query_groups)

    norm = name + "input_layernorm.weight"
    found = [
        _plain(key + "linear_qkv.layer_norm_weight", layer, norm, (a.hidden_size,)),
        merged("weight", (a.hidden_size,)),
    ]
    if a.add_qkv_bias:
        found.append(merged("bias", ()))
    if a.qk_layernorm:
        for x in "qk":
            norm = f"{name}self_attn.{x}_norm.weight"
            found.append(_plain(f"{key}{x}_layernorm.weight", layer, norm, (a.kv_channels,)))
    found.append(_plain(key + "linear_proj.weight", layer, name + "self_attn.o_proj.weight", (a.hidden_size, heads)))
    return found


def _mlp(a: Architecture, layer: int) -> list[Piece]:
    key, name = _LAYERS + "mlp.", f"model.layers.{layer}."
    up = (a.ffn_hidden_size, a.hidden_size)
    norm = name + "post_attention_layernorm.weight"
    return [
        _plain(key + "linear_fc1.layer_norm_weight", layer, norm, (a.hidden_size,)),
        _plain(key + "linear_fc1.weight", layer, name + "mlp.gate_proj.weight", up),
        _plain(key + "linear_fc1.weight", layer, name + "mlp.up_proj.weight", up, first_row=a.ffn_hidden_size),
        _plain(key + "linear_fc2.weight", layer, name + "mlp.down_proj.weight", up[::-1]),
    ]
