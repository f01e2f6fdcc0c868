"""What a run costs, by arithmetic alone: parameters, bytes and judge calls. Nothing here touches a device.

Parameter counts are exact. Weights, gradients and optimizer states follow from them exactly; activations, logits and
caches are estimates of their largest moment (the allocator's fragmentation and the libraries' workspaces come on top).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.model.presets import Architecture

BYTES_FP32 = 4


def stage_parameters(arch: Architecture, vocab_rows: int, stage: int, pp: int, tp: int = 1) -> int:
    """Parameters on one tensor-parallel rank of pipeline stage ``stage`` (from 0); norms are on each rank.

    ``vocab_rows``: rows of the padded embedding. A tied embedding has a copy on the last stage.
    """
    count = arch.num_layers // pp * _layer_parameters(arch, tp)
    embedding = vocab_rows * arch.hidden_size // tp
    is_first, is_last = stage == 0, stage == pp - 1
    if is_first:
        count += embedding
    if is_last:
        count += arch.hidden_size
        if arch.untie_embeddings_and_output_weights or not is_first:
            count += embedding
    return count


def query_width(arch: Architecture) -> int:
    """Numbers of a token's queries, all heads together."""
    return arch.num_attention_heads * arch.kv_channels


def key_value_width(arch: Architecture) -> int:
    """Numbers of a token's keys and values in one layer."""
    return 2 * arch.num_query_groups * arch.kv_channels


def layer_matrix_parameters(arch: Architecture) -> int:
    """Weights of a layer's matrices: queries, keys, values, projection, and the three of SwiGLU."""
    return arch.hidden_size * (2 * query_width(arch) + key_value_width(arch) + 3 * arch.ffn_hidden_size)


def layer_activations(arch: Architecture, tp: int, sequence_parallel: bool) -> int:
    """Numbers per token that a layer keeps for its backward pass, on one tensor-parallel rank."""
    # Residuals and norm outputs are split by sequence parallel alone ...
    whole = 4 * arch.hidden_size // (tp if sequence_parallel else 1)
    # ... q, k, v, the attention's output, the two halves of SwiGLU and their product by tensor parallel.
    return whole + (2 * query_width(arch) + key_value_width(arch) + 3 * arch.ffn_hidden_size) // tp


def _layer_parameters(arch: Architecture, tp: int) -> int:
    bias = query_width(arch) + key_value_width(arch) if arch.add_qkv_bias else 0
    split = layer_matrix_parameters(arch) + bias
    norms = 2 * arch.hidden_size + (2 * arch.kv_channels if arch.qk_layernorm else 0)
    return split // tp + norms


@dataclass(frozen=True)
class Layout:
    """How ranks split the model."""

    tp: int
    pp: int
    dp: int
    virtual_stages: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True


@dataclass(frozen=True)
class Precision:
    """Bytes per number."""

    weight: int
    gradient: int

    @property
    def optimizer(self) -> int:
        """Adam's two moments in fp32, and an fp32 master copy of weights that are not fp32 themselves."""
        return 2 * BYTES_FP32 + (BYTES_FP32 if self.weight < BYTES_FP32 else 0)


@dataclass(frozen=True)
class Workload:
    """The largest passes of a step."""

    micro_batch_tokens: int
    """Rows x row length of the largest micro-batch."""
    scored_positions: int
    """Rows x scored positions of the micro-batch with the most of them: each has logits."""
    vocab_rows: int
    """Rows of the padded embedding."""
    micro_batches: int
    """Micro-batches of one schedule call on one replica."""
    full_recompute: bool
    cached_tokens: int
    """Prefix and rollout tokens whose keys and values stand in the cache at once; 0 without rollouts."""
    decode_rows: int
    """Sequences decoded at once."""
    reference_weight_bytes: int
    """Bytes per weight of the reference on the device: 0 without one, or if it waits on the host."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of one pipeline stage."""

    stage: int
    parameters: int
    """A count, not bytes."""
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    kv_cache: int

    @property
    def resident(self) -> int:
        """What stays for the whole run."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> int:
        """The larger of training and generating: they do not happen at the same time."""
        return self.resident + max(self.activations + self.logits, self.kv_cache)


def rank_memory(arch: Architecture, layout: Layout, precision: Precision, work: Workload, stage: int) -> RankMemory:
    """Estimate the bytes of one rank of pipeline stage ``stage``."""
    count = stage_parameters(arch, work.vocab_rows, stage, layout.pp, layout.tp)
    weights = count * precision.weight
    shards = layout.dp if layout.distributed_optimizer else 1
    is_last = stage == layout.pp - 1
    return RankMemory(
        stage=stage,
        parameters=count,
        weights=weights,
        gradients=count * precision.gradient,
        optimizer=-(-count * precision.optimizer // shards),
        reference=count * work.reference_weight_bytes,
        activations=_activation_bytes(arch, layout, precision, work, stage),
        logits=_logit_bytes(layout, precision, work) if is_last else 0,
        kv_cache=_cache_bytes(arch, layout, precision, work, is_last),
    )


def _activation_bytes(arch: Architecture, layout: Layout, precision: Precision, work: Workload, stage: int) -> int:
    """What the backward pass keeps, times the micro-batches that are in flight on this stage under 1F1B."""
    tokens, width = work.micro_batch_tokens, precision.weight
    layer = tokens * layer_activations(arch, layout.tp, layout.sequence_parallel) * width
    layers = arch.num_layers // layout.pp
    in_flight = min(layout.pp - stage, work.micro_batches)
    if work.full_recompute:
        # Only each layer's input is kept; one layer at a time is computed again.
        boundary = tokens * arch.hidden_size // (layout.tp if layout.sequence_parallel else 1) * width
        return layers * boundary * in_flight + layer
    interleaved = 1 + (layout.pp - 1) / (layout.pp * layout.virtual_stages) if layout.virtual_stages > 1 else 1
    return round(layers * layer * in_flight * interleaved)


def _logit_bytes(layout: Layout, precision: Precision, work: Workload) -> int:
    """Logits and their gradient in the model's precision, and one fp32 copy while the loss is computed."""
    return work.scored_positions * work.vocab_rows // layout.tp * (2 * precision.weight + BYTES_FP32)


def _cache_bytes(arch: Architecture, layout: Layout, precision: Precision, work: Workload, is_last: bool) -> int:
    per_token = key_value_width(arch) // layout.tp * (arch.num_layers // layout.pp)
    logits = work.decode_rows * work.vocab_rows // layout.tp * BYTES_FP32 if is_last else 0
    return work.cached_tokens * per_token * precision.weight + logits
