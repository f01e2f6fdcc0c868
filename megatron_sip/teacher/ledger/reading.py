"""A ledger for people: filter its verdicts, sum them up, and see what was asked and answered."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.teacher.http.failures import KINDS
from megatron_sip.teacher.interfaces import FloatArray, IntArray
from megatron_sip.teacher.ledger.archive import open_for_reading
from megatron_sip.teacher.ledger.files import existing_segments
from megatron_sip.teacher.ledger.records import decompressed
from megatron_sip.teacher.ledger.segment import raw_text

FAILURE_FILTERS = ("any", "none", *KINDS, "other")
COLUMNS = (
    "criterion", "judge", "model", "sampling", "prompt", "step", "sample_id", "options", "vote", "score", "failure",
    "message", "latency_s", "created_s", "lost",
)  # fmt: skip
"""Of the view ``verdicts``."""
_JOINS = """FROM votes v JOIN questions q ON q.id = v.question JOIN judges j ON j.id = q.judge
JOIN batches b ON b.id = v.batch LEFT JOIN failures f ON f.id = v.failure"""
_VALUES = """j.criterion, j.judge, j.model, j.sampling, hex(q.prompt), b.step, b.sample_id, q.options, v.vote, v.score,
f.kind, f.message, v.latency_us / 1e6, b.created_s, b.lost, v.batch, v.place, b.passages"""
_BIN = 1.01
"""Latencies are counted in bins this much apart: percentiles are right to 1 %."""


@dataclass(frozen=True)
class Filter:
    """Which verdicts; all conditions hold at once."""

    criterion: str = ""
    judge: str = ""
    """Part of the judge's or the model's name."""
    scores: tuple[float, float] | None = None
    """Both ends included; a missing score is in no range."""
    failure: str = ""
    """One of ``FAILURE_FILTERS``; "" for all verdicts, missing or not."""
    steps: tuple[int, int] | None = None
    """Both ends included."""
    sample_id: int | None = None

    def where(self) -> tuple[str, list[Any]]:
        """SQL and its values."""
        parts: list[tuple[str, list[Any]]] = []
        if self.criterion:
            parts.append(("j.criterion = ?", [self.criterion]))
        if self.judge:
            parts.append(("(instr(j.judge, ?) OR instr(j.model, ?))", [self.judge, self.judge]))
        if self.scores is not None:
            parts.append(("v.score BETWEEN ? AND ?", list(self.scores)))
        if self.failure in ("any", "none"):
            parts.append((f"v.failure IS {'NOT ' if self.failure == 'any' else ''}NULL", []))
        elif self.failure:
            parts.append(("f.kind = ?", [self.failure]))
        if self.steps is not None:
            parts.append(("b.step BETWEEN ? AND ?", list(self.steps)))
        if self.sample_id is not None:
            parts.append(("b.sample_id = ?", [self.sample_id]))
        sql = " AND ".join(part for part, _ in parts)
        return (f" WHERE {sql}" if sql else ""), [value for _, values in parts for value in values]


@dataclass(frozen=True)
class Row:
    """One verdict."""

    replica: int
    values: dict[str, Any]
    """By the names in ``COLUMNS``."""
    raw: str
    """What was said, "" where it is not kept."""
    passages: dict[str, Any] | None
    """Prefix, candidates and kinds, where they are kept and were asked for."""


@dataclass
class JudgeSummary:
    """Of one judge of one criterion; the states of running statistics count as one."""

    votes: int = 0
    answered: int = 0
    total: float = 0.0
    """Sum of scores."""
    hits: int = 0
    failures: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bins: IntArray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def percentiles(self, shares: Sequence[float]) -> FloatArray:
        """Seconds, float64; NaN without votes."""
        if not self.bins.sum():
            return np.full(len(shares), np.nan)
        at = np.searchsorted(np.cumsum(self.bins), np.asarray(shares) * self.bins.sum())
        return np.asarray((_BIN ** at.astype(np.float64) - 1) / 1e6)


class Reader:
    """All files of a ledger; raises DataError for one that is none."""

    def __init__(self, base: Path) -> None:
        self._files = [(file, open_for_reading(file.path)) for file in existing_segments(base)]

    @property
    def num_bytes(self) -> int:
        return sum(file.path.stat().st_size for file, _ in self._files)

    @property
    def num_files(self) -> int:
        return len(self._files)

    def rows(self, chosen: Filter, with_raw: bool = False, with_passages: bool = False) -> Iterator[Row]:
        """File by file, in the order of questions."""
        where, parameters = chosen.where()
        kept = " AND b.passages IS NOT NULL" if with_passages else ""
        where = where + kept if where else kept.replace(" AND", " WHERE", 1)
        for file, db in self._files:
            for *values, batch, place, passages in db.execute(f"SELECT {_VALUES} {_JOINS}{where}", parameters):
                raw = raw_text(db, batch, place) if with_raw else ""
                texts = _texts(db, passages) if with_passages else None
                yield Row(file.replica, dict(zip(COLUMNS, values, strict=True)), raw, texts)

    def summary(self, chosen: Filter) -> dict[tuple[str, str, str], JudgeSummary]:
        """By criterion, judge and model."""
        found: dict[tuple[str, str, str], JudgeSummary] = defaultdict(JudgeSummary)
        where, parameters = chosen.where()
        columns = "j.criterion, j.judge, j.model, f.kind"
        for _, db in self._files:
            for *who, kind, votes, total in db.execute(
                f"SELECT {columns}, COUNT(*), TOTAL(v.score) {_JOINS}{where} GROUP BY {columns}", parameters
            ):
                summary = found[_owner(*who)]
                summary.votes += votes
                if kind is None:
                    summary.answered += votes
                    summary.total += total
                else:
                    summary.failures[kind] += votes
            rows = db.execute(f"SELECT j.criterion, j.judge, j.model, v.latency_us {_JOINS}{where}", parameters)
            while some := rows.fetchmany(100_000):
                _count_latencies(found, some)
            self._count_hits(db, chosen, found)
        return dict(found)

    def _count_hits(
        self, db: sqlite3.Connection, chosen: Filter, found: dict[tuple[str, str, str], JudgeSummary]
    ) -> None:
        """Hits are known by judge and step alone."""
        where, parameters = Filter(criterion=chosen.criterion, judge=chosen.judge).where()
        if chosen.steps is not None:
            where += " AND h.step BETWEEN ? AND ?" if where else " WHERE h.step BETWEEN ? AND ?"
            parameters += chosen.steps
        sql = "SELECT j.criterion, j.judge, j.model, SUM(h.hits) FROM hits h JOIN judges j ON j.id = h.judge"
        for *who, hits in db.execute(f"{sql}{where} GROUP BY j.id", parameters):
            found[_owner(*who)].hits += hits

    def close(self) -> None:
        for _, db in self._files:
            db.close()


def _owner(criterion: str, judge: str, model: str) -> tuple[str, str, str]:
    return criterion, judge, model.partition("@")[0]


def _count_latencies(
    found: dict[tuple[str, str, str], JudgeSummary], rows: Sequence[tuple[str, str, str, int]]
) -> None:
    by_owner: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for *who, latency in rows:
        by_owner[_owner(*who)].append(latency)
    for owner, latencies in by_owner.items():
        bins = np.rint(np.log1p(np.array(latencies, dtype=np.float64)) / np.log(_BIN)).astype(np.int64)
        summary = found[owner]
        size = max(len(summary.bins), int(bins.max()) + 1)
        summary.bins = np.bincount(bins, minlength=size) + np.pad(summary.bins, (0, size - len(summary.bins)))


def _texts(db: sqlite3.Connection, passages: int) -> dict[str, Any]:
    (frame,) = db.execute("SELECT texts FROM passages WHERE id = ?", (passages,)).fetchone()
    texts: dict[str, Any] = decompressed(frame)
    return texts
