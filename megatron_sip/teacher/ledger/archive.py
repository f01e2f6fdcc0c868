"""The ledger of a whole run, for reading: all replicas, all files."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.teacher.interfaces import JudgeIdentity, Verdict
from megatron_sip.teacher.ledger.files import existing_segments
from megatron_sip.teacher.ledger.records import Asked
from megatron_sip.teacher.ledger.segment import check_format, chunks, marks, raw_text, sqlite_errors

_ROWS = """
SELECT q.prompt, v.vote, v.batch, v.score, f.message, v.latency_us, v.place, b.lost, b.step, b.sample_id
FROM questions q JOIN votes v ON v.question = q.id JOIN batches b ON b.id = v.batch
LEFT JOIN failures f ON f.id = v.failure
WHERE q.judge = ? AND q.prompt IN ({}) ORDER BY v.batch
"""


@dataclass(frozen=True)
class Recorded:
    """One verdict, with who asked for it, and for which group."""

    replica: int
    step: int | None
    sample_id: int
    verdict: Verdict


class Archive:
    """Open until ``close``; files are opened for reading only."""

    def __init__(self, base: Path) -> None:
        """Raises DataError if there is none, or a file of it cannot be read."""
        self.base = base
        self._files = [(file, open_for_reading(file.path)) for file in existing_segments(base)]
        self._judges: list[dict[tuple[str, JudgeIdentity], int]] = []
        for file, db in self._files:
            with sqlite_errors(file.path, "read"):
                rows = db.execute("SELECT id, criterion, judge, model, sampling FROM judges").fetchall()
            self._judges.append({(row[1], JudgeIdentity(*row[2:])): row[0] for row in rows})

    def identities(self, criterion: str) -> list[JudgeIdentity]:
        """All judges of a criterion that gave a verdict, each once, in the order of their first."""
        return list(dict.fromkeys(i for judges in self._judges for c, i in judges if c == criterion))

    def find(
        self, criterion: str, identity: JudgeIdentity, asked: Collection[Asked], with_raw: bool = False
    ) -> dict[Asked, list[Recorded]]:
        """Per vote what was said each time it was asked, in order: failures, then at most one answer that stayed.

        Failures in steps that a resumed run did again are left out. ``with_raw``: with the words, where they are kept.
        """
        found: dict[Asked, list[Recorded]] = {}
        for (file, db), judges in zip(self._files, self._judges, strict=True):
            judge = judges.get((criterion, identity))
            if judge is None:
                continue
            for some in chunks(sorted({key.prompt for key in asked})):
                with sqlite_errors(file.path, "read"):
                    rows = db.execute(_ROWS.format(marks(some)), (judge, *some)).fetchall()
                for prompt, vote, batch, score, failure, latency, place, lost, step, sample in rows:
                    key = Asked(prompt, vote)
                    if key not in asked or (failure is not None and lost):
                        continue
                    raw = raw_text(db, batch, place) if with_raw else ""
                    value = float("nan") if score is None else float(score)
                    verdict = Verdict(value, raw, failure or "", latency / 1e6)
                    found.setdefault(key, []).append(Recorded(file.replica, step, sample, verdict))
        return found

    def close(self) -> None:
        for _, db in self._files:
            db.close()


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Raises DataError for a file that is no ledger of ours."""
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30.0)
        check_format(db, path)
    except sqlite3.Error as error:
        raise DataError(f"ledger {path} cannot be read ({error}): give the path of --judge-ledger") from error
    return db
