"""docs/design/traps.md names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "design" / "traps.md"


def test_every_test_that_the_table_of_traps_names_exists() -> None:
    guards = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE.read_text(encoding="utf-8"))
    assert len(guards) >= 20
    missing = [f"{path}::{name}" for path, name in guards if f"def {name}(" not in (ROOT / path).read_text()]
    assert not missing


def test_every_trap_has_a_guard() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    guards = [row.rstrip(" |").rpartition(" | ")[2] for row in rows if not row.startswith("| trap ")]
    assert len(guards) >= 25
    known = ("`tests/", "the same test")
    assert not [guard for guard in guards if not guard.startswith(known)]
