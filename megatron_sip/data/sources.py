"""Which source each document of a corpus comes from: ``<prefix>.sources``, beside ``.bin`` and ``.idx``.

The file is one line of JSON, the names, and after it a little-endian uint16 per document: the position of its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.records import lookup
from megatron_sip.errors import DataError

_MOST = 1 << 16
UNKNOWN = "(none)"
"""Of a document without the field, or with an object or a list in it."""


def source_of(fields: Mapping[str, Any], path: str) -> str:
    """The name in a field, given by its name or dotted path."""
    try:
        value = lookup(fields, path)
    except ValueError:
        return UNKNOWN
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value) if isinstance(value, str | int | float) else UNKNOWN


@dataclass(frozen=True)
class Sources:
    """Names, and for each document the position of its own, uint16 [documents]."""

    names: tuple[str, ...]
    codes: NDArray[np.uint16]


def coded(values: Iterable[str]) -> Sources:
    """Names in the order of their first document."""
    column = SourceColumn()
    numbers = [column.number_of(value) for value in values]
    return Sources(tuple(column.names), np.array(numbers, dtype=np.uint16))


class SourceColumn:
    """Collects the sources of a corpus part by part."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self._codes: list[NDArray[np.uint16]] = []

    def number_of(self, name: str) -> int:
        """Raises ``DataError`` for too many names."""
        number = self.names.setdefault(name, len(self.names))
        if number >= _MOST:
            raise DataError(f"--source-field has more than {_MOST:,} values ({name!r}): give a field with fewer")
        return number

    def add(self, part: Sources) -> None:
        numbers = np.array([self.number_of(name) for name in part.names], dtype=np.uint16)
        self._codes.append(numbers[part.codes])

    def as_bytes(self) -> bytes:
        """The content of the file."""
        # Surrogates cannot be in a name that UTF-8 holds: JSON escapes them.
        head = json.dumps({"names": list(self.names)}).encode()
        return head + b"\n" + b"".join(codes.astype("<u2").tobytes() for codes in self._codes)


def sources_path(prefix: str) -> Path:
    """Where the sources of a corpus are."""
    return Path(f"{prefix}.sources")


def read_sources(prefix: str, num_documents: int) -> Sources | None:
    """The sources of a corpus, None if they were not kept. Raises ``DataError`` for a damaged file."""
    path = sources_path(prefix)
    if not path.is_file():
        return None
    head, _, rest = path.read_bytes().partition(b"\n")
    try:
        names = tuple(map(str, json.loads(head)["names"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); preprocess the corpus again, or delete the file") from error
    if len(rest) != 2 * num_documents or (rest and int(np.frombuffer(rest, "<u2").max()) >= len(names)):
        raise DataError(
            f"{path}: {len(rest)} bytes and {len(names)} names do not fit {num_documents} documents; preprocess the "
            "corpus again, or delete the file"
        )
    return Sources(names, np.frombuffer(rest, "<u2").astype(np.uint16))
