"""What a Megatron checkpoint says of itself: its architecture, its vocabulary, its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_sip.checkpoint import layout
from megatron_sip.checkpoint.reading import StoredTensors, read_common, read_index
from megatron_sip.errors import CheckpointError
from megatron_sip.huggingface.correspondence import EMBEDDING
from megatron_sip.model.presets import Architecture, RopeScaling

_PREFIXES = ("", "model.", "module.", "module.model.")
_NEEDED = tuple(
    field.name for field in fields(Architecture) if field.name not in ("max_position_embeddings", "rope_scaling")
)


@dataclass(frozen=True)
class Source:
    """A checkpoint to be exported."""

    directory: Path
    numbers: Mapping[str, Any]
    """Names and values of the architecture, ours or Megatron-LM's."""
    vocab_size: int
    fingerprint: str
    stored: StoredTensors
    prefix: str
    """Before every key of the model."""

    def architecture(self, like: Architecture | None) -> Architecture:
        """Its architecture; what does not change the weights is taken from ``like`` where the checkpoint lacks it.

        Raises:
            CheckpointError: it does not say enough, or differs from ``like``.
        """
        missing = [name for name in _NEEDED if self.numbers.get(name) is None]
        if missing:
            raise CheckpointError(f"{self.directory} does not say its {missing[0]}: it cannot be exported.")
        scaling = None
        if self.numbers.get("use_rope_scaling"):
            known = like.rope_scaling if like is not None and like.rope_scaling is not None else RopeScaling()
            factor = self.numbers.get("rope_scaling_factor")
            named = {"factor": float(factor)} if factor is not None else {}
            ours = self.numbers.get("rope_scaling")  # a word in Megatron-LM's arguments
            scaling = replace(known, **{**named, **(ours if isinstance(ours, Mapping) else {})})
        length = self.numbers.get("max_position_embeddings") or (like.max_position_embeddings if like else None)
        if length is None:
            raise CheckpointError(
                f"{self.directory} does not say its longest sequence: name the model it was trained from with --like."
            )
        own = Architecture(
            **{name: self.numbers[name] for name in _NEEDED}, max_position_embeddings=length, rope_scaling=scaling
        )
        if like is not None and replace(like, max_position_embeddings=length) != own:
            differing = [f.name for f in fields(own) if getattr(own, f.name) != getattr(like, f.name)]
            name = next(name for name in differing if name != "max_position_embeddings")
            raise CheckpointError(
                f"{self.directory} is of another model than the configuration beside it: {name} is "
                f"{getattr(own, name)!r} in the one and {getattr(like, name)!r} in the other. Correct --like."
            )
        return own

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's tensors by key, without the prefix."""
        stored = self.stored
        return {k.removeprefix(self.prefix): s for k, s in stored.shapes.items() if stored.is_of_the_model(k)}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses tensors that are missing, too many or of other shapes; the vocabulary may have more rows.

        Raises:
            CheckpointError: names them.
        """
        found = self.shapes()
        problems = [f"{key} is missing" for key in expected if key not in found]
        problems += [f"{key} has no place in this architecture" for key in found if key not in expected]
        for key, shape in expected.items():
            rows = found.get(key, shape)
            if rows != shape and not (shape[0] < rows[0] and rows[1:] == shape[1:] and "layers" not in key):
                problems.append(f"{key} is {list(rows)} and not {list(shape)}")
        if problems:
            raise CheckpointError(f"{self.directory} cannot be exported: {'; '.join(problems[:3])}.")


def open_checkpoint(root: Path, step: int | None) -> Source:
    """The checkpoint of ``step``, or the latest, under ``root``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    directory = layout.resolve(root, step)
    if directory is None:
        raise CheckpointError(f"{root} holds no checkpoint: correct the path.")
    problem = layout.damage(directory)
    if problem:
        raise CheckpointError(f"{problem}.")
    common, stored = read_common(directory), read_index(directory)
    prefix = next((p for p in _PREFIXES if p + EMBEDDING in stored.shapes), None)
    if prefix is None:
        raise CheckpointError(f"{directory} has no {EMBEDDING}: it is no language model of Megatron's.")
    identity = common.get("identity", {})
    numbers = {**identity.get("architecture", {}), **identity.get("unchecked", {})}
    if not identity and "args" in common:
        numbers = vars(common["args"])
        if not numbers.get("group_query_attention", True):
            numbers = {**numbers, "num_query_groups": numbers.get("num_attention_heads")}
    rows = stored.shapes[prefix + EMBEDDING][0]
    vocab_size = identity.get("vocab_size") or numbers.get("vocab_size") or rows
    return Source(directory, numbers, int(vocab_size), identity.get("tokenizer", ""), stored, prefix)
