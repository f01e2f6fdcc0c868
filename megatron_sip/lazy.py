"""Names of a package that are imported when somebody asks for them: options are read without torch (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def imported_when_asked_for(package: str, **names: str) -> Callable[[str], Any]:
    """A package's ``__getattr__``; ``names`` are module -> its names, separated by blanks."""
    homes = {name: module for module, listed in names.items() for name in listed.split()}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
