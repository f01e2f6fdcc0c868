"""Presets, their exact sizes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sip.errors import ConfigurationError
from megatron_sip.model import ModelConfig, RopeScaling, count_parameters, padded_vocab_size
from megatron_sip.model.layer_spec import uses_transformer_engine
from megatron_sip.model.presets import PRESETS, training_flops_per_token


@pytest.mark.parametrize(
    ("preset", "vocab_size", "parameters"),
    [("llama2-1.4b", 32000, 1_345_423_360), ("llama3.1-8b", 128256, 8_030_261_248)],
)
def test_presets_have_the_stated_number_of_parameters_and_so_has_transformers(
    preset: str, vocab_size: int, parameters: int
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    a = PRESETS[preset]
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size, hidden_size=a.hidden_size, intermediate_size=a.ffn_hidden_size,
                num_hidden_layers=a.num_layers, num_attention_heads=a.num_attention_heads,
                num_key_value_heads=a.num_query_groups, head_dim=a.kv_channels, tie_word_embeddings=False,
            )
        )  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert count_parameters(a, vocab_size) == parameters


def test_tied_weights_biases_and_head_norms_are_counted() -> None:
    # hidden 8, 2 heads and 1 group of 4, FFN 6, vocabulary 10, one layer, by hand:
    # q 64, k and v 64, proj 64, biases 16, head norms 8, FFN 144, norms 16 -> 376; embedding 80; final norm 8.
    config = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=6,
        untie_embeddings_and_output_weights=False, add_qkv_bias=True, qk_layernorm=True,
    )  # fmt: skip
    assert count_parameters(config.resolve(), 10) == 376 + 80 + 8


def test_flops_are_six_per_multiplying_weight_and_token() -> None:
    config = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=6,
    )  # fmt: skip
    # Weights 64 + 64 + 64 + 144 + norms 24, output layer 80; attention 6 * 1 * 8 * S.
    assert training_flops_per_token(config.resolve(), 10, 100) == 6 * (360 + 80) + 4800


def test_overrides_win_over_the_preset_and_heads_follow() -> None:
    a = ModelConfig(preset="llama3.1-8b", num_attention_heads=16, num_layers=2).resolve()
    assert (a.num_layers, a.num_query_groups, a.kv_channels, a.hidden_size) == (2, 16, 256, 4096)
    assert a.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192) and a.rotary_base == 500000.0
    assert ModelConfig(preset="llama3.1-8b", use_rope_scaling=False).resolve().rope_scaling is None
    assert ModelConfig(use_rope_scaling=True, rope_scaling_factor=32.0).resolve().rope_scaling == RopeScaling(32.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": "llama9"}, "choose one of tiny, llama2-1.4b"),
        ({"num_layers": 0}, "--num-layers is 0"),
        ({"num_attention_heads": 4, "num_query_groups": 3}, "--num-query-groups 3"),
        ({"kv_channels": 7}, "--kv-channels is 7"),
        ({"recompute_num_layers": 0}, "--recompute-num-layers is 0"),
        ({"hidden_dropout": 0.1}, "--hidden-dropout 0.1 must be 0"),
    ],
)
def test_an_architecture_that_cannot_work_is_refused_with_its_remedy(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ModelConfig(**fields).validate()


def test_heads_must_divide_into_the_tensor_parallel_ranks() -> None:
    with pytest.raises(ConfigurationError, match="--num-query-groups 2 is not divisible"):
        ModelConfig().validate_tensor_parallel(4)
    ModelConfig().validate_tensor_parallel(2)


def test_transformer_engine_cannot_be_had_on_cpu() -> None:
    assert not uses_transformer_engine("auto", torch.device("cpu"))
    with pytest.raises(ConfigurationError, match="needs CUDA"):
        uses_transformer_engine("transformer_engine", torch.device("cpu"))


def test_vocabulary_is_padded_to_a_multiple_of_tensor_ranks_times_the_divisor() -> None:
    assert padded_vocab_size(32000, 128, 1) == 32000
    assert padded_vocab_size(32001, 128, 2) == 32256
