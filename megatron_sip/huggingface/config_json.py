"""From transformers' ``config.json`` to an ``Architecture`` and back.

What the policy cannot compute is refused by name: a model that converts gives the same logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sip.errors import CheckpointError, ConfigurationError
from megatron_sip.model.presets import Architecture, RopeScaling

CONFIG = "config.json"

_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # transformers leaves nothing out of its own files; other writers do, and mean these.
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
}


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no {CONFIG}: it is no model of transformers.") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return values


def architecture_of(config: Mapping[str, Any], where: Path) -> Architecture:
    """The architecture that ``config.json`` describes.

    Raises:
        ConfigurationError: of another family, or with a feature that the policy has not; names it and what is possible.
        CheckpointError: a number is missing, or none.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ConfigurationError(
            f"{where}: model_type is {family!r}; {', '.join(_FAMILIES)} can be converted, other architectures cannot."
        )
    values = {**_DEFAULTS[family], **{key: value for key, value in config.items() if value is not None}}
    for key, allowed in _MUST_BE.items():
        if key in values and values[key] not in allowed:
            raise ConfigurationError(
                f"{where}: {key} is {values[key]!r}; only {allowed[0]!r} can be converted, the policy has no other."
            )
    try:
        heads = int(values["num_attention_heads"])
        return Architecture(
            num_layers=int(values["num_hidden_layers"]),
            hidden_size=int(values["hidden_size"]),
            num_attention_heads=heads,
            num_query_groups=int(values.get("num_key_value_heads", heads)),
            ffn_hidden_size=int(values["intermediate_size"]),
            kv_channels=int(values.get("head_dim", int(values["hidden_size"]) // heads)),
            max_position_embeddings=int(values["max_position_embeddings"]),
            rotary_base=_rotary_base(values),
            rope_scaling=_rope_scaling(values, where),
            norm_epsilon=float(values["rms_norm_eps"]),
            untie_embeddings_and_output_weights=not values.get("tie_word_embeddings", False),
            add_qkv_bias=family == "qwen2",
            qk_layernorm=family == "qwen3",
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]} is missing.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: a number of it is none ({error}): correct the file.") from error


def config_of(
    architecture: Architecture, vocab_size: int, dtype: torch.dtype, like: Mapping[str, Any] | None, eod: int | None
) -> dict[str, Any]:
    """``config.json`` of an architecture.

    Args:
        architecture: what it must describe.
        vocab_size: rows of the embedding.
        dtype: of the weights.
        like: the one of the model that training started from: kept but for vocabulary and type, where it fits.
        eod: the token that ends documents, for generation.

    Raises:
        ConfigurationError: transformers has no such model.
    """
    name = "dtype" if like is not None and "dtype" in like else "torch_dtype"
    if like is not None and architecture_of(like, Path(CONFIG)) == architecture:
        return {**like, "vocab_size": vocab_size, name: _TYPES[dtype]}
    a = architecture
    if a.add_qkv_bias and a.qk_layernorm:
        raise ConfigurationError(
            "--add-qkv-bias together with --qk-layernorm: transformers has no such model without further biases."
        )
    family = "qwen3" if a.qk_layernorm else "qwen2" if a.add_qkv_bias else "llama"
    values: dict[str, Any] = {
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.norm_epsilon,
        "rope_theta": a.rotary_base,
        "rope_scaling": _rope_entry(a.rope_scaling),
        "attention_dropout": 0.0,
        "tie_word_embeddings": not a.untie_embeddings_and_output_weights,
        "use_cache": True,
        "torch_dtype": _TYPES[dtype],
        "bos_token_id": None,
        "eos_token_id": eod,
    }
    if family != "qwen2":
        values["attention_bias"] = False
    if family == "llama":
        values["mlp_bias"] = False
    else:
        values["use_sliding_window"] = False
    return values


def recipe_of(architecture: Architecture) -> dict[str, Any]:
    """The ``model`` section of a recipe that describes the same architecture."""
    scaling = architecture.rope_scaling
    section: dict[str, Any] = {
        name: getattr(architecture, name) for name in Architecture.__dataclass_fields__ if name != "rope_scaling"
    }
    section["use_rope_scaling"] = scaling is not None
    if scaling is not None:
        section |= {
            "rope_scaling_factor": scaling.factor,
            "rope_low_freq_factor": scaling.low_freq_factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
            "rope_original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return section


def _rope_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 has one entry for base and scaling, 4 has two.
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _rotary_base(values: Mapping[str, Any]) -> float:
    return float(_rope_values(values).get("rope_theta", values.get("rope_theta", 10000.0)))


def _rope_scaling(values: Mapping[str, Any], where: Path) -> RopeScaling | None:
    rope = _rope_values(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigurationError(f"{where}: RoPE scaling of type {kind!r}; only 'llama3' can be converted.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigurationError(f"{where}: partial_rotary_factor is {rope['partial_rotary_factor']}; only 1 works.")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _rope_entry(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
