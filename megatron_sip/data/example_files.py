"""JSON-lines files that a long job appends to, and may be killed at any moment without harm to them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_sip.errors import DataError

PROGRESS = "progress.json"


class ExampleFiles:
    """Files that grow together, and how far they are: one longer than the last record of progress is cut back."""

    def __init__(self, directory: Path, names: Sequence[str], identity: dict[str, Any]) -> None:
        """``names``: of the files in ``directory``. ``identity``: what they are made from; another is refused. Raises
        DataError for files that are not as they were left."""
        self._directory = directory
        self._names = names
        self._identity = identity
        self.counts: Counter[str] = Counter()
        """Examples by name."""
        self.dropped: Counter[str] = Counter()
        """What became no example, by reason."""
        self.waiting: dict[int, str] = {}
        """Lines that were passed and are to be done again, with why."""
        self.next_line = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise DataError(f"{directory} is a file: give a directory") from error
        sizes = self._resume() if (directory / PROGRESS).exists() else {}
        for name in self._names:
            path = directory / name
            size = path.stat().st_size if path.exists() else 0
            if (size and not sizes) or size < sizes.get(name, 0):
                raise DataError(
                    f"{path} is not as {PROGRESS} says ({size:,} bytes, {sizes.get(name, 0):,} are recorded): give "
                    "another --output, or empty this one if it may be made again"
                )
            if size > sizes.get(name, 0):
                os.truncate(path, sizes.get(name, 0))
        # Before any example, so that what a run left that was killed at once is known to be ours.
        self.write((), self.next_line)

    def _resume(self) -> dict[str, int]:
        """Takes over what an earlier run has recorded; returns the sizes of its files."""
        path = self._directory / PROGRESS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, sizes = found["options"], {str(name): int(size) for name, size in found["sizes"].items()}
            self.counts, self.dropped = Counter(found["counts"]), Counter(found["dropped"])
            self.next_line = int(found["next_line"])
            self.waiting = {int(line): str(why) for line, why in found.get("waiting", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not of this tool ({error!r}): give another --output") from error
        changed = sorted(n for n in {*before, *self._identity} if before.get(n) != self._identity.get(n))
        if changed and (self.counts or self.next_line):
            names = ", ".join(name.replace("_", "-") for name in changed)
            raise DataError(
                f"{self._directory} holds examples made with other options ({names}): give another --output"
            )
        return sizes

    def write(self, records: Sequence[tuple[str, dict[str, Any]]], next_line: int) -> None:
        """Appends records by file name; after it a stopped run goes on at ``next_line``."""
        by_name: dict[str, list[bytes]] = {}
        for name, record in records:
            by_name.setdefault(name, []).append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        for name, lines in by_name.items():
            with (self._directory / name).open("ab") as stream:
                stream.write(b"".join(lines))
                stream.flush()
                os.fsync(stream.fileno())
        for name in self._names:
            (self._directory / name).touch()
        self.next_line = next_line
        content = {
            "next_line": next_line,
            "counts": dict(sorted(self.counts.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "waiting": dict(sorted(self.waiting.items())),
            "sizes": {name: (self._directory / name).stat().st_size for name in self._names},
            "options": self._identity,
        }
        temporary = self._directory / (PROGRESS + ".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._directory / PROGRESS)
