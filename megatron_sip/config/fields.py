"""Declares one option of the program: a dataclass field that knows its help text.

Every package keeps its own frozen config dataclass built of these. The field name is the YAML key, and with dashes in
place of underscores the flag; names are therefore unique over all config classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, field
from typing import Any


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    default_factory: Callable[[], Any] | None = None,
    metavar: str | None = None,
    also_called: Sequence[str] = (),
) -> Any:
    """A dataclass field with a help text; ``choices`` are checked wherever a value comes from.

    ``also_called``: names that other programs have for it; they are not accepted, but lead to it.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices else None, "metavar": metavar}
    metadata["also_called"] = tuple(also_called)
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)
