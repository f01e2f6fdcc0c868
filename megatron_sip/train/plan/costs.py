"""Operations and bytes of forward, backward, decode and optimizer passes, counted from shapes.

    h, f, L, V  hidden and FFN width, layers, vocabulary     q, k  width of queries; of keys and values together
    M  weights of a layer's matrices, h (2q + k + 3f)         w  bytes of a weight
    n  tokens computed      s  scored positions (each has logits)      a  attended pairs of query and key

A product of a weight and a token is 2 operations, in the backward pass 4 more (Kaplan et al. 2020, section 2.1). A pair
of query and key costs 2q for its score and 2q for its value, and twice that backward; causality leaves half of the
pairs of a sequence (Megatron-LM's ``num_floating_point_operations`` counts the same). What kernels compute twice is no
operation of the model: it lowers their efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_sip.model.presets import Architecture
from megatron_sip.train.estimate import (
    BYTES_FP32,
    key_value_width,
    layer_activations,
    layer_matrix_parameters,
    query_width,
)

FORWARD_TOUCHES, TRAIN_TOUCHES = 2, 6
"""Times that a number which a layer keeps moves: written and read; backward read again, with its gradient written, read
and summed. Kernels that fuse steps move less, and then reach more of the bandwidth."""
FORWARD_LOGIT_TOUCHES, TRAIN_LOGIT_TOUCHES = 4, 8
"""The same of a logit in float32: product, maximum, exponential, sum; backward scaling and two products."""


@dataclass(frozen=True)
class Work:
    """What one rank has to do. All numbers add up."""

    matmul_flops: float = 0.0
    weight_bytes: float = 0.0
    """Weights read for the products: what bounds them where few tokens share them."""
    attention_flops: float = 0.0
    cache_bytes: float = 0.0
    """Keys and values read for attention."""
    moved_bytes: float = 0.0
    """Everything else that goes through memory."""
    launches: float = 0.0
    """Layers times passes: each takes some time whatever its size."""
    sent_bytes: float = 0.0
    """What this rank sends in collectives."""
    collectives: float = 0.0

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.attention_flops

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes + self.moved_bytes

    def __add__(self, other: Work) -> Work:
        return Work(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})

    def __mul__(self, times: float) -> Work:
        return Work(**{item.name: getattr(self, item.name) * times for item in fields(self)})


@dataclass(frozen=True)
class Share:
    """What one rank holds of the model."""

    architecture: Architecture
    num_layers: int
    vocab_size: int
    """V, of tokens: padded columns are not multiplied."""
    weight_bytes: int
    tp: int = 1
    sequence_parallel: bool = False
    has_output: bool = True
    """Whether it holds the output layer (last pipeline stage)."""

    @property
    def layer_weights(self) -> float:
        """Weights of the layers' matrices on this rank."""
        return self.num_layers * layer_matrix_parameters(self.architecture) / self.tp

    @property
    def output_weights(self) -> float:
        """Weights of the output layer on this rank."""
        return self.vocab_size * self.architecture.hidden_size / self.tp if self.has_output else 0.0

    @property
    def cache_bytes_per_token(self) -> float:
        """Keys and values of a token in this rank's layers."""
        return self.num_layers * key_value_width(self.architecture) / self.tp * self.weight_bytes


@dataclass(frozen=True)
class Rows:
    """A micro-batch of rows [prefix | C candidates of T tokens]; C = 0 is a next-token window, scored everywhere."""

    num_rows: int
    width: float
    """Tokens of the prefix block or the window, padding included."""
    attended: float
    """Prefix tokens that the candidates attend to: without the padding."""
    num_candidates: int = 0
    candidate_tokens: int = 0

    @property
    def tokens(self) -> float:
        """n."""
        return self.num_rows * (self.width + self.num_candidates * self.candidate_tokens)

    @property
    def scored(self) -> float:
        """s."""
        if not self.num_candidates:
            return self.num_rows * self.width
        return self.num_rows * self.num_candidates * self.candidate_tokens

    @property
    def pairs(self) -> float:
        """a = rows (P²/2 + C T p + C T²/2), p the prefix without padding."""
        own = self.candidate_tokens**2 / 2
        cross = self.candidate_tokens * self.attended
        return self.num_rows * (self.width**2 / 2 + self.num_candidates * (cross + own))


def forward(share: Share, rows: Rows) -> Work:
    """Forward pass with log-probs of the scored positions: 2 n L M + 2 s V h and 4 q a L operations."""
    return _pass(share, rows, 1, FORWARD_TOUCHES, FORWARD_LOGIT_TOUCHES, 1)


def train(share: Share, rows: Rows, recomputes_logits: bool, full_recompute: bool = False) -> Work:
    """Forward and backward: three times the operations of ``forward``.

    ``recomputes_logits``: the loss is not linear in the log-probs, so that the backward pass computes the logits of the
    scored positions again (docs/design/compute.md); ``full_recompute``: and all layers.
    """
    work = _pass(share, rows, 3, TRAIN_TOUCHES, TRAIN_LOGIT_TOUCHES, 2)
    again = 2 * rows.scored * share.output_weights if recomputes_logits else 0.0
    work += Work(matmul_flops=again)
    if full_recompute:
        work += replace(forward(replace(share, has_output=False), rows), weight_bytes=0.0, launches=0.0)
    return work


def _pass(share: Share, rows: Rows, times: int, touches: int, logit_touches: int, directions: int) -> Work:
    arch, width = share.architecture, share.weight_bytes
    scored = rows.scored if share.has_output else 0.0
    activations = layer_activations(arch, share.tp, share.sequence_parallel) * share.num_layers
    logits = scored * share.vocab_size / share.tp * BYTES_FP32
    sums, summed = _tensor_parallel_sums(share, rows.tokens, scored, directions)
    return Work(
        matmul_flops=times * 2 * (rows.tokens * share.layer_weights + scored * share.output_weights),
        weight_bytes=times * (share.layer_weights + share.output_weights) * width,
        attention_flops=times * 4 * query_width(arch) / share.tp * rows.pairs * share.num_layers,
        moved_bytes=touches * rows.tokens * activations * width + logit_touches * logits,
        launches=share.num_layers,
        sent_bytes=all_reduce_bytes(summed, share.tp),
        collectives=sums,
    )


def _tensor_parallel_sums(share: Share, tokens: float, scored: float, directions: int) -> tuple[float, float]:
    """Collectives of a pass and the bytes that they sum.

    Tensor parallel sums the hidden states twice in a layer, in each direction (Shoeybi et al. 2019, section 3), and
    those that the embedding looks up; the output layer its softmax's denominators and targets (two small ones, in a
    block of positions at least) and going back the gradient of the hidden states of scored positions.
    """
    if share.tp == 1:
        return 0.0, 0.0
    hidden = share.architecture.hidden_size * share.weight_bytes
    sums, summed = 2.0 * share.num_layers * directions + 1, (2 * share.num_layers * directions + 1) * tokens * hidden
    if share.has_output:
        sums, summed = (
            sums + 2 + (directions - 1),
            summed + scored * 3 * BYTES_FP32 + (directions - 1) * scored * hidden,
        )
    return sums, summed


def prefill(share: Share, num_groups: int, width: float) -> Work:
    """Reads G prefixes of the batch's width: 2 G P L M + 2 G P² q L operations, and logits of one position each."""
    rows = Rows(num_groups, width, width)
    work = forward(_without_output(share), rows)
    cache = share.cache_bytes_per_token * num_groups * width
    flops = 2 * num_groups * share.output_weights
    return work + Work(matmul_flops=flops, moved_bytes=cache, weight_bytes=share.output_weights * share.weight_bytes)


def decode_step(share: Share, num_groups: int, slots: int, width: float, own_tokens: float) -> Work:
    """One token for G prefixes of K rollouts that have ``own_tokens`` each.

    2 R (L M + V h) + 4 q R (P + t) L operations for R = G K rows; it reads the weights once, a prefix's keys and values
    once for all its rollouts, and each row's own: (G P + R t) 2 g d L w bytes.
    """
    arch, rows = share.architecture, num_groups * slots
    activations = layer_activations(arch, share.tp, False) * share.num_layers * share.weight_bytes
    logits = rows * share.vocab_size / share.tp * BYTES_FP32 if share.has_output else 0.0
    sums = 2 * share.num_layers if share.tp > 1 else 0
    return Work(
        matmul_flops=2 * rows * (share.layer_weights + share.output_weights),
        weight_bytes=(share.layer_weights + share.output_weights) * share.weight_bytes,
        attention_flops=4 * query_width(arch) / share.tp * rows * (width + own_tokens) * share.num_layers,
        cache_bytes=share.cache_bytes_per_token * (num_groups * width + rows * own_tokens),
        moved_bytes=FORWARD_TOUCHES * rows * activations + FORWARD_LOGIT_TOUCHES * logits,
        launches=share.num_layers,
        sent_bytes=sums * all_reduce_bytes(rows * arch.hidden_size * share.weight_bytes, share.tp),
        collectives=sums,
    )


def decode(share: Share, num_groups: int, slots: int, width: float, new_tokens: int) -> Work:
    """All steps after the prefill, which gives the first token: own tokens 1 .. N - 1, on average N / 2."""
    return decode_step(share, num_groups, slots, width, new_tokens / 2) * (new_tokens - 1)


def optimizer(parameters: float, gradient_bytes: int, weight_bytes: int, num_layers: int, shards: int) -> Work:
    """AdamW on a rank's share of the parameters.

    Of a parameter that is the rank's own: the gradient is read for the norm, read and written to clip, and read once
    more; two moments and the float32 weight are read and written (24 bytes); the weight in another precision is
    written. Zeroing the gradient is not in it: that is done at the step's begin.
    """
    moved = 4 * gradient_bytes + 2 * 3 * BYTES_FP32 + (weight_bytes if weight_bytes < BYTES_FP32 else 0)
    return Work(moved_bytes=parameters / shards * moved, launches=num_layers)


def all_reduce_bytes(size: float, ranks: int) -> float:
    """What a rank sends to sum ``size`` bytes over all ranks by a ring: 2 (n - 1) / n of them."""
    return 2 * (ranks - 1) / ranks * size


def _without_output(share: Share) -> Share:
    return replace(share, has_output=False)
