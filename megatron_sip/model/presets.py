"""Architectures by name, and what follows from their numbers alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low RoPE frequencies (Meta's reference code; transformers: ``rope_type: llama3``)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A Llama-style decoder: RMSNorm, SwiGLU, grouped-query attention, RoPE."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    kv_channels: int
    """Width of one attention head."""
    max_position_embeddings: int
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    untie_embeddings_and_output_weights: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False


PRESETS: dict[str, Architecture] = {
    # For laptops and tests; a few minutes of training on two cores teach it something.
    "tiny": Architecture(
        num_layers=4, hidden_size=160, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=432, kv_channels=40,
        max_position_embeddings=1024,
    ),
    # The paper's policy. With a vocabulary of 32,000: 1,345,423,360 parameters.
    "llama2-1.4b": Architecture(
        num_layers=24, hidden_size=2048, num_attention_heads=16, num_query_groups=16, ffn_hidden_size=5504,
        kv_channels=128, max_position_embeddings=4096,
    ),
    # With its vocabulary of 128,256: 8,030,261,248 parameters.
    "llama3.1-8b": Architecture(
        num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336,
        kv_channels=128, max_position_embeddings=131072, rotary_base=500000.0, rope_scaling=RopeScaling(),
    ),
}  # fmt: skip


def count_parameters(architecture: Architecture, vocab_size: int) -> int:
    """Exact number of parameters, without the padding of the vocabulary."""
    a = architecture
    query_width = a.num_attention_heads * a.kv_channels
    key_value_width = 2 * a.num_query_groups * a.kv_channels
    attention = a.hidden_size * (query_width + key_value_width) + query_width * a.hidden_size
    if a.add_qkv_bias:
        attention += query_width + key_value_width
    if a.qk_layernorm:
        attention += 2 * a.kv_channels
    layer = attention + 3 * a.hidden_size * a.ffn_hidden_size + 2 * a.hidden_size
    embeddings = vocab_size * a.hidden_size * (2 if a.untie_embeddings_and_output_weights else 1)
    return a.num_layers * layer + embeddings + a.hidden_size


def training_flops_per_token(architecture: Architecture, vocab_size: int, sequence_length: int) -> float:
    """Floating-point operations of forward and backward for one token of a causal sequence.

    Six per weight that multiplies (Kaplan et al. 2020, section 2.1; the embedding look-up does not, the output layer
    does), and 6 * h * d * S per layer for attention scores and values, of which causality needs half.
    """
    a = architecture
    look_up = vocab_size * a.hidden_size if a.untie_embeddings_and_output_weights else 0
    multiplying = count_parameters(a, vocab_size) - look_up
    attention = 6.0 * a.num_layers * a.num_attention_heads * a.kv_channels * sequence_length
    return 6.0 * multiplying + attention


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding: Megatron's rule, the next multiple of ``divisible_by`` times TP."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple
