"""What must agree between a checkpoint and the run that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_sip.errors import CheckpointError
from megatron_sip.model.presets import Architecture

Plain = int | float | str | bool | None

_ALWAYS: Mapping[str, Plain] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
}
"""What Megatron-LM has options for, and the policy has not."""

_FREE = ("max_position_embeddings", "rope_scaling")


@dataclass(frozen=True)
class ModelIdentity:
    """Architecture and vocabulary of a model; a checkpoint carries it and a load compares it."""

    vocab_size: int
    """Real tokens, without padding: padding depends on the layout."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer's contents; "" if it is not known."""
    architecture: Mapping[str, Plain] = field(default_factory=dict)
    """Megatron-LM's names (num_layers, hidden_size, ...) and their values."""
    unchecked: Mapping[str, Any] = field(default_factory=dict)
    """What a load may change, for tools that export the model."""

    def as_plain(self) -> dict[str, Any]:
        """As dictionaries, for the checkpoint."""
        return {**asdict(self), "architecture": dict(self.architecture), "unchecked": dict(self.unchecked)}


def identity_of(architecture: Architecture, vocab_size: int, tokenizer: str) -> ModelIdentity:
    """What a checkpoint of a policy must agree with; ``tokenizer`` is the tokenizer's fingerprint.

    The longest sequence is not compared: with RoPE a run may raise it.
    """
    numbers: dict[str, Plain] = {name: value for name, value in asdict(architecture).items() if name not in _FREE}
    scaling = architecture.rope_scaling
    if scaling is not None:
        numbers["rope_scaling_factor"] = scaling.factor
    checked = {**_ALWAYS, **numbers, "use_rope_scaling": scaling is not None}
    unchecked: dict[str, Any] = {"max_position_embeddings": architecture.max_position_embeddings}
    if scaling is not None:
        unchecked["rope_scaling"] = asdict(scaling)
    return ModelIdentity(vocab_size, tokenizer, checked, unchecked)


def check_identity(directory: Path, common: Mapping[str, Any], expected: ModelIdentity) -> None:
    """Compares what both sides know; a Megatron-LM checkpoint knows its ``args``.

    Raises:
        CheckpointError: one line with every difference, both values each.
    """
    found = _found(common)
    differences = [
        f"{name} is {found[name]!r} in it and {value!r} here"
        for name, value in _flat(expected).items()
        if name in found and value not in ("", None) and found[name] not in ("", None) and found[name] != value
    ]
    if differences:
        raise CheckpointError(
            f"{directory} does not fit this run: {'; '.join(differences)}. "
            "Give the options of the run that wrote it, or load another checkpoint."
        )


def _flat(identity: ModelIdentity) -> dict[str, Plain]:
    return {**identity.architecture, "vocab_size": identity.vocab_size, "tokenizer": identity.tokenizer}


def _found(common: Mapping[str, Any]) -> dict[str, Any]:
    if "identity" in common:
        return _flat(ModelIdentity(**common["identity"]))
    if "args" in common:
        found = vars(common["args"])
        if not found.get("group_query_attention", True):  # its default number of groups then means nothing
            found = {**found, "num_query_groups": found.get("num_attention_heads")}
        return {name: value for name, value in found.items() if name != "tokenizer"}
    return {}
