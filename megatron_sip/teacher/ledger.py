"""Every verdict that was given, in one SQLite file per replica: a cache, a source for replay, a record to read.

A verdict's key is the SHA-256 of criterion, judge, model, sampling, prompt and *vote index*: a hundred votes on one
question are a hundred rows. Writing is transactional (write-ahead log): a process killed at any moment leaves whole
batches or nothing of them.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.teacher.interfaces import JudgeIdentity, Verdict

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    key BLOB PRIMARY KEY,
    criterion TEXT NOT NULL,
    judge TEXT NOT NULL,
    model TEXT NOT NULL,
    sampling TEXT NOT NULL,
    prompt_hash TEXT NOT NULL,
    sample_id INTEGER NOT NULL,
    options TEXT NOT NULL,
    vote INTEGER NOT NULL,
    score REAL,
    raw TEXT NOT NULL,
    failure TEXT NOT NULL,
    latency_s REAL NOT NULL,
    created_s REAL NOT NULL
) WITHOUT ROWID
"""
_INSERT = f"INSERT OR REPLACE INTO verdicts VALUES ({', '.join('?' * 14)})"
_LOOKUP_BATCH = 500


@dataclass(frozen=True)
class LedgerKey:
    """What identifies one vote."""

    criterion: str
    identity: JudgeIdentity
    prompt_hash: str
    vote: int

    def digest(self) -> bytes:
        parts = (
            self.criterion,
            self.identity.name,
            self.identity.model,
            self.identity.sampling,
            self.prompt_hash,
            str(self.vote),
        )
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()


@dataclass(frozen=True)
class LedgerEntry:
    key: LedgerKey
    verdict: Verdict
    sample_id: int
    options: tuple[int, ...]
    """Positions of the candidates in their group, in the order shown; for the reader."""


class Ledger:
    def __init__(self, path: Path) -> None:
        """Open or create. Raises DataError if the file is something else or cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=30.0)
            # NORMAL does not wait for the disk: a killed process loses nothing, a power cut the last batches.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version not in (0, _SCHEMA_VERSION):
                raise DataError(f"judge-ledger {path} has format {version}, not {_SCHEMA_VERSION}: name another file")
            with self._db:
                self._db.execute(_SCHEMA)
                self._db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise DataError(f"judge-ledger {path} cannot be opened ({error}): name another file") from error

    def find(self, keys: Sequence[LedgerKey]) -> list[Verdict | None]:
        """The verdict kept under each key; None if there is none, or only a failure, which is worth asking again."""
        digests = [key.digest() for key in keys]
        found: dict[bytes, Verdict] = {}
        for start in range(0, len(digests), _LOOKUP_BATCH):
            batch = digests[start : start + _LOOKUP_BATCH]
            rows = self._db.execute(
                "SELECT key, score, raw, latency_s FROM verdicts "
                f"WHERE failure = '' AND key IN ({', '.join('?' * len(batch))})",
                batch,
            )
            found |= {key: Verdict(score, raw, latency_s=latency) for key, score, raw, latency in rows}
        return [found.get(digest) for digest in digests]

    def add(self, entries: Sequence[LedgerEntry]) -> None:
        """Keep a batch, in one transaction. A missing score is stored as NULL."""
        now = time.time()
        rows = [
            (
                entry.key.digest(),
                entry.key.criterion,
                entry.key.identity.name,
                entry.key.identity.model,
                entry.key.identity.sampling,
                entry.key.prompt_hash,
                entry.sample_id,
                " ".join(map(str, entry.options)),
                entry.key.vote,
                None if math.isnan(entry.verdict.score) else entry.verdict.score,
                entry.verdict.raw,
                entry.verdict.failure or ("missing" if math.isnan(entry.verdict.score) else ""),
                entry.verdict.latency_s,
                now,
            )
            for entry in entries
        ]
        with self._db:
            self._db.executemany(_INSERT, rows)

    def count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0])

    def close(self) -> None:
        self._db.close()
