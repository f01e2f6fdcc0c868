"""Says what a checkpoint holds, without a model and without process groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from megatron_sip.checkpoint import layout
from megatron_sip.checkpoint.reading import StoredTensors, read_common, read_index
from megatron_sip.errors import CheckpointError


def describe(root: Path, step: int | None, with_optimizer: bool = False) -> str:
    """A text about the checkpoint of ``step`` (or the latest) under ``root``: origin, model, tensors with shapes.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    directory = layout.resolve(root, step)
    if directory is None:
        raise CheckpointError(f"{root} holds no checkpoint: correct the path.")
    common, stored = read_common(directory), read_index(directory)
    manifest = layout.read_manifest(directory)
    about = manifest.about if manifest else {}
    lines = [
        f"{directory}: step {common.get('iteration', '?')}, whole steps here: {layout.whole_steps(directory.parent)}",
        "written by "
        + (f"megatron_sip, {_pairs(about, 'identity')}" if about else "another program, Megatron-LM's kind"),
    ]
    identity = common.get("identity", {})
    if identity:
        lines.append(f"model {_pairs(identity['architecture'])}, {_pairs(identity, 'architecture', 'unchecked')}")
    if "run" in common:
        lines.append(f"state of the run: {', '.join(sorted(common['run'])) or 'none'}")
    lines.append(f"{count_numbers(stored):,} numbers in the model; tensors:")
    keys = [key for key in sorted(stored.shapes) if with_optimizer or stored.is_of_the_model(key)]
    lines += [f"  {key}  {list(stored.shapes[key])}" for key in keys]
    return "\n".join(lines)


def count_numbers(stored: StoredTensors) -> int:
    """Numbers in the tensors of the model, padding of the vocabulary included."""
    return sum(math.prod(shape) for key, shape in stored.shapes.items() if stored.is_of_the_model(key))


def _pairs(values: Mapping[str, object], *without: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()) if name not in without)
