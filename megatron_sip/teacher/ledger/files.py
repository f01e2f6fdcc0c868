"""Names of a ledger's files: ``runs/x/ledger.sqlite`` stands for ``runs/x/ledger.r000.00001.sqlite`` and so on.

The first number is the data-parallel replica, the second counts the files that it has filled (``ledger-rotate-mib``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.errors import DataError

_SQLITES_OWN = ("-wal", "-shm", "-journal")
_NUMBERS = re.compile(r"\.r(\d{3,})\.(\d{5,})$")


@dataclass(frozen=True, order=True)
class SegmentFile:
    replica: int
    number: int
    path: Path


def segment_path(base: Path, replica: int, number: int) -> Path:
    """``number`` counts from 1."""
    return base.with_name(f"{base.stem}.r{replica:03d}.{number:05d}{base.suffix}")


def segments(base: Path) -> list[SegmentFile]:
    """Files of the ledger ``base``, by replica and number; also those of a single file or directory that is named."""
    if base.is_dir():
        paths = list(base.iterdir())
    elif _numbers(base) is not None:
        paths = [base] if base.is_file() else []
    elif base.parent.is_dir():
        paths = [path for path in base.parent.iterdir() if path.suffix == base.suffix and _stem(path) == base.stem]
    else:
        paths = []
    own = [path for path in paths if not path.name.endswith(_SQLITES_OWN) and path.is_file()]
    found = [(path, _numbers(path)) for path in own]
    return sorted(SegmentFile(*numbers, path) for path, numbers in found if numbers is not None)


def existing_segments(base: Path) -> list[SegmentFile]:
    """The same; raises DataError if there is none."""
    if found := segments(base):
        return found
    example = segment_path(base, 0, 1)
    raise DataError(f"no ledger at {base} (looked for {example.name} and the like): give the path of --judge-ledger")


def _numbers(path: Path) -> tuple[int, int] | None:
    found = _NUMBERS.search(path.stem)
    return (int(found.group(1)), int(found.group(2))) if found else None


def _stem(path: Path) -> str:
    return _NUMBERS.sub("", path.stem)
