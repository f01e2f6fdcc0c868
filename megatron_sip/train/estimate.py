"""What a run costs, by arithmetic alone: parameters, bytes and judge calls. Nothing here touches a device.

Parameter counts are exact. Weights, gradients and optimizer states follow from them exactly; activations, logits and
caches are estimates of their largest moment (the allocator's fragmentation and the libraries' workspaces come on top).
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES_FP32 = 4


@dataclass(frozen=True)
class Architecture:
    """A Llama-style dense decoder: RMSNorm, SwiGLU, RoPE, grouped queries, no dropout."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding; padded or not, as the caller wants to count."""
    tied_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False

    def layer_parameters(self, tp: int = 1) -> int:
        """Parameters of one layer on one of ``tp`` tensor-parallel ranks; norms are on each of them."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        qkv_width = (heads + 2 * groups) * self.head_dim
        matrices = self.hidden_size * (qkv_width + heads * self.head_dim + 3 * self.ffn_hidden_size)
        biases = qkv_width if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return (matrices + biases) // tp + norms

    def embedding_parameters(self, tp: int = 1) -> int:
        """Parameters of the embedding, or of an output layer of its own."""
        return self.vocab_size * self.hidden_size // tp

    def stage_parameters(self, stage: int, pp: int, tp: int = 1) -> int:
        """Parameters on one rank of pipeline stage ``stage``, from 0. A tied embedding has a copy on the last stage."""
        count = self.num_layers // pp * self.layer_parameters(tp)
        is_first, is_last = stage == 0, stage == pp - 1
        if is_first:
            count += self.embedding_parameters(tp)
        if is_last:
            count += self.hidden_size
            if not (self.tied_embeddings and is_first):
                count += self.embedding_parameters(tp)
        return count

    @property
    def total_parameters(self) -> int:
        """Parameters of the model, each counted once."""
        copies = 1 if self.tied_embeddings else 2
        return (
            self.num_layers * self.layer_parameters() + copies * self.embedding_parameters() + self.hidden_size
        )


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
    micro_batches: int
    """Micro-batches of one schedule call on one replica."""
    full_recompute: bool
    cached_tokens: int
    """Prefix and rollout tokens whose keys and values stand in the cache at once; 0 without rollouts."""
    decode_rows: int
    """Sequences decoded at once."""
    reference: str
    """"device", "host" or "none"."""


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
    """Estimate the bytes of one rank of pipeline stage ``stage``; ``arch.vocab_size`` is the padded one."""
    count = arch.stage_parameters(stage, layout.pp, layout.tp)
    weights = count * precision.weight
    shards = layout.dp if layout.distributed_optimizer else 1
    is_last = stage == layout.pp - 1
    return RankMemory(
        stage=stage,
        parameters=count,
        weights=weights,
        gradients=count * precision.gradient,
        optimizer=-(-count * precision.optimizer // shards),
        reference=weights if work.reference == "device" else 0,
        activations=_activation_bytes(arch, layout, precision, work, stage),
        logits=_logit_bytes(arch, layout, precision, work.scored_positions) if is_last else 0,
        kv_cache=_cache_bytes(arch, layout, precision, work, is_last),
    )


def _activation_bytes(arch: Architecture, layout: Layout, precision: Precision, work: Workload, stage: int) -> int:
    """What the backward pass keeps, times the micro-batches that are in flight on this stage under 1F1B."""
    tokens, width = work.micro_batch_tokens, precision.weight
    # Kept by a layer, in numbers per token: residuals and norm outputs (split by sequence parallel alone) ...
    whole = 4 * arch.hidden_size // (layout.tp if layout.sequence_parallel else 1)
    # ... and q, k, v, the attention's output, the two halves of SwiGLU and their product (split by tensor parallel).
    qkv = (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim
    split = (qkv + arch.num_attention_heads * arch.head_dim + 3 * arch.ffn_hidden_size) // layout.tp
    layer = tokens * (whole + split) * width
    layers = arch.num_layers // layout.pp
    in_flight = min(layout.pp - stage, work.micro_batches)
    if work.full_recompute:
        # Only each layer's input is kept; one layer at a time is computed again.
        boundary = tokens * arch.hidden_size // (layout.tp if layout.sequence_parallel else 1) * width
        return layers * boundary * in_flight + layer
    interleaved = 1 + (layout.pp - 1) / (layout.pp * layout.virtual_stages) if layout.virtual_stages > 1 else 1
    return round(layers * layer * in_flight * interleaved)


def _logit_bytes(arch: Architecture, layout: Layout, precision: Precision, positions: int) -> int:
    """Logits, their fp32 softmax kept for the backward pass, and the gradient."""
    return positions * arch.vocab_size // layout.tp * (2 * precision.weight + BYTES_FP32)


def _cache_bytes(arch: Architecture, layout: Layout, precision: Precision, work: Workload, is_last: bool) -> int:
    per_token = 2 * arch.num_query_groups * arch.head_dim // layout.tp * (arch.num_layers // layout.pp)
    logits = work.decode_rows * arch.vocab_size // layout.tp * BYTES_FP32 if is_last else 0
    return work.cached_tokens * per_token * precision.weight + logits


def pad_vocabulary(vocab_size: int, divisor: int, tp: int) -> int:
    """Rows of the embedding after padding, so that each tensor-parallel rank has the same number of them."""
    multiple = divisor * tp
    return -(-vocab_size // multiple) * multiple


def all_pairs(num_candidates: int) -> int:
    """Comparisons of each candidate with each other one: n (n - 1) / 2."""
    return num_candidates * (num_candidates - 1) // 2
