"""One SQLite file of a ledger.

``judges`` who was asked, ``questions`` one row per prompt and judge, ``votes`` one row per verdict, ``batches`` one row
per write with its time, step and compressed words, ``passages`` the texts that were judged, ``hits``
how many votes were answered from here. The view ``verdicts`` joins
them for people with an SQLite shell. Writing is transactional (write-ahead log): a process killed at any moment leaves
whole batches or nothing of them.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_sip.errors import DataError
from megatron_sip.teacher.http.failures import kind_of
from megatron_sip.teacher.interfaces import JudgeIdentity, Verdict
from megatron_sip.teacher.ledger.bloom import Bloom
from megatron_sip.teacher.ledger.records import Asked, Context, compressed, decompressed, is_missing

T = TypeVar("T")
FORMAT = 2
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE judges (
    id INTEGER PRIMARY KEY, criterion TEXT NOT NULL, judge TEXT NOT NULL, model TEXT NOT NULL, sampling TEXT NOT NULL,
    UNIQUE (criterion, judge, model, sampling)
);
CREATE TABLE questions (id INTEGER PRIMARY KEY, prompt BLOB NOT NULL, judge INTEGER NOT NULL, options TEXT NOT NULL);
CREATE UNIQUE INDEX question_of_prompt ON questions (prompt, judge);
CREATE TABLE votes (
    question INTEGER NOT NULL, vote INTEGER NOT NULL, batch INTEGER NOT NULL,
    score REAL, failure INTEGER, latency_us INTEGER NOT NULL, place INTEGER,
    PRIMARY KEY (question, vote, batch)
) WITHOUT ROWID;
CREATE TABLE failures (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, message TEXT NOT NULL UNIQUE);
CREATE TABLE passages (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, texts BLOB NOT NULL);
CREATE TABLE batches (
    id INTEGER PRIMARY KEY, created_s REAL NOT NULL, step INTEGER, sample_id INTEGER NOT NULL,
    passages INTEGER, raw BLOB, lost INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE hits (
    judge INTEGER NOT NULL, step INTEGER NOT NULL, hits INTEGER NOT NULL, PRIMARY KEY (judge, step)
) WITHOUT ROWID;
CREATE VIEW verdicts AS
    SELECT j.criterion, j.judge, j.model, j.sampling, hex(q.prompt) AS prompt, b.step, b.sample_id, q.options, v.vote,
        v.score, f.kind AS failure, f.message, v.latency_us / 1e6 AS latency_s, b.created_s, b.lost
    FROM votes v JOIN questions q ON q.id = v.question JOIN judges j ON j.id = q.judge JOIN batches b ON b.id = v.batch
        LEFT JOIN failures f ON f.id = v.failure;
"""
_AT_ONCE = 500
"""Values in one SQL list."""


@dataclass(frozen=True)
class NewVote:
    """What is added: one verdict with its place in the ledger."""

    asked: Asked
    options: tuple[int, ...]
    """Positions of the candidates in their group, in the order shown; for the reader."""
    verdict: Verdict
    keep_raw: bool


class Segment:
    """Opened for writing; ``archive`` reads."""

    def __init__(self, path: Path, ledger_id: str = "") -> None:
        """Open, or create with the ledger's id. Raises DataError if it is something else or cannot be written."""
        self.path = path
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60.0, isolation_level=None)
            # NORMAL does not wait for the disk: a killed process loses nothing, a power cut the last batches.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA cache_size=-65536")
            if check_format(self._db, path, allow_empty=True) == 0:
                self._create(ledger_id)
            if not self.closed:
                self._db.execute("PRAGMA journal_mode=WAL")
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"judge-ledger {path} cannot be opened ({error}): name another file") from error
        self._judges: dict[tuple[str, JudgeIdentity], int] = {}
        self._bloom: Bloom | None = None

    @property
    def ledger_id(self) -> str:
        return self._meta("ledger").decode()

    @property
    def closed(self) -> bool:
        """Whether it is full: nothing is added any more."""
        if not self._closed:
            self._closed = self._db.execute("SELECT 1 FROM meta WHERE name = 'bloom'").fetchone() is not None
        return self._closed

    @property
    def size(self) -> int:
        """Bytes, what the write-ahead log holds included."""
        pages, page = (int(self._db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "page_size"))
        return pages * page

    @property
    def last_batch(self) -> int:
        return int(self._db.execute("SELECT COALESCE(MAX(id), 0) FROM batches").fetchone()[0])

    @property
    def last_step(self) -> int:
        """-1 without any."""
        return int(self._db.execute("SELECT COALESCE(MAX(step), -1) FROM batches").fetchone()[0])

    def find(
        self, criterion: str, identity: JudgeIdentity, asked: Collection[Asked], with_raw: bool = False
    ) -> dict[Asked, Verdict]:
        """The scores that are kept, of these prompts at least; without failures, which are worth asking again."""
        with sqlite_errors(self.path, "read"):
            return self._find(criterion, identity, asked, with_raw)

    def _find(
        self, criterion: str, identity: JudgeIdentity, asked: Collection[Asked], with_raw: bool
    ) -> dict[Asked, Verdict]:
        judge = self._judge(criterion, identity)
        if judge is None:
            return {}
        prompts = {key.prompt for key in asked}
        if self.closed:
            self._bloom = self._bloom or Bloom.load(self._meta("bloom"))
            prompts = self._bloom.may_hold(prompts)
        found: dict[Asked, Verdict] = {}
        for some in chunks(sorted(prompts)):
            rows = self._db.execute(
                "SELECT q.prompt, v.vote, v.score, v.latency_us, v.batch, v.place "
                "FROM questions q JOIN votes v ON v.question = q.id "
                f"WHERE q.judge = ? AND v.failure IS NULL AND q.prompt IN ({marks(some)})",
                (judge, *some),
            )
            for prompt, vote, score, latency, batch, place in rows:
                raw = raw_text(self._db, batch, place) if with_raw else ""
                found[Asked(prompt, vote)] = Verdict(score, raw, latency_s=latency / 1e6)
        return found

    def add(
        self, criterion: str, identity: JudgeIdentity, context: Context, votes: Sequence[NewVote], texts: bool
    ) -> bool:
        """Keep a batch, in one transaction; False if the file is closed, perhaps by another process.

        ``texts``: keep the passages of the context with it.
        """
        with self._transaction():
            if self.closed:
                return False
            judge = self._judge(criterion, identity, create=True)
            assert judge is not None
            batch = self.last_batch + 1
            questions = self._questions(judge, votes)
            kept = [vote.verdict.raw for vote in votes if vote.keep_raw and vote.verdict.raw]
            place, rows = 0, []
            for vote in votes:
                verdict, has_raw = vote.verdict, vote.keep_raw and bool(vote.verdict.raw)
                failure = self._failure(verdict) if is_missing(verdict.score) else None
                score = None if failure is not None else verdict.score
                latency = round(verdict.latency_s * 1e6)
                question, number = questions[vote.asked.prompt], vote.asked.vote
                rows.append((question, number, batch, score, failure, latency, place if has_raw else None))
                place += has_raw
            self._db.executemany("INSERT OR REPLACE INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            passages = self._passages(context) if texts else None
            self._db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, 0)",
                (batch, time.time(), context.step, context.sample_id, passages, compressed(kept) if kept else None),
            )
        return True

    def add_hits(self, criterion: str, identity: JudgeIdentity, step: int | None, count: int) -> bool:
        """Count votes that were answered from the ledger, as ``add`` does. Outside of training the step is -1."""
        with self._transaction():
            if self.closed:
                return False
            self._db.execute(
                "INSERT INTO hits VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET hits = hits + excluded.hits",
                (self._judge(criterion, identity, create=True), -1 if step is None else step, count),
            )
        return True

    def close_for_good(self) -> None:
        """Nothing is added any more: leaves one file that can be read from anywhere."""
        with self._transaction():
            if not self.closed:
                prompts = [row[0] for row in self._db.execute("SELECT prompt FROM questions")]
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('bloom', ?)", (Bloom.of(prompts).dump(),))
        # Fails while another process reads: then the log stays beside it, which does no harm.
        with sqlite_errors(self.path, "written"):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def mark_lost(self, after_batch: int) -> None:
        """Batches after this one belong to steps that a resumed run does again."""
        with self._transaction():
            self._db.execute("UPDATE batches SET lost = 1 WHERE id > ?", (after_batch,))

    def mark_steps_lost(self, steps: Collection[int], but: str = "") -> None:
        """Likewise the failed votes of these steps, of all criteria ``but`` one."""
        with self._transaction():
            found = f"SELECT id FROM batches WHERE step IN ({marks(steps)})"
            ids = [row[0] for row in self._db.execute(found, tuple(steps))]
            for some in chunks(ids):
                self._db.execute(
                    "UPDATE batches SET lost = 1 WHERE id IN (SELECT v.batch FROM votes v "
                    "JOIN questions q ON q.id = v.question JOIN judges j ON j.id = q.judge "
                    f"WHERE v.failure IS NOT NULL AND j.criterion <> ? AND v.batch IN ({marks(some)}))",
                    (but, *some),
                )

    def count(self) -> int:
        """Votes, failed ones included."""
        return int(self._db.execute("SELECT COUNT(*) FROM votes").fetchone()[0])

    def close(self) -> None:
        self._db.close()

    def _create(self, ledger_id: str) -> None:
        with self._transaction():
            if check_format(self._db, self.path, allow_empty=True) == 0:
                for statement in _SCHEMA.strip().split(";\n"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('ledger', ?)", (ledger_id.encode(),))
                self._db.execute(f"PRAGMA user_version={FORMAT}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with sqlite_errors(self.path, "written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # On a full disk SQLite has done so by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _meta(self, name: str) -> bytes:
        (value,) = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return bytes(value)

    def _judge(self, criterion: str, identity: JudgeIdentity, create: bool = False) -> int | None:
        key = (criterion, identity)
        if key not in self._judges:
            values = (criterion, identity.name, identity.model, identity.sampling)
            if create:
                self._db.execute(
                    "INSERT OR IGNORE INTO judges (criterion, judge, model, sampling) VALUES (?, ?, ?, ?)", values
                )
            row = self._db.execute(
                "SELECT id FROM judges WHERE criterion = ? AND judge = ? AND model = ? AND sampling = ?", values
            ).fetchone()
            if row is None:
                return None
            if create:
                # Its transaction may yet be rolled back.
                return int(row[0])
            self._judges[key] = int(row[0])
        return self._judges[key]

    def _questions(self, judge: int, votes: Sequence[NewVote]) -> dict[bytes, int]:
        """Row of each prompt; new ones get one."""
        options = {vote.asked.prompt: vote.options for vote in votes}
        known: dict[bytes, int] = {}
        for some in chunks(sorted(options)):
            known.update(
                self._db.execute(
                    f"SELECT prompt, id FROM questions WHERE judge = ? AND prompt IN ({marks(some)})", (judge, *some)
                ).fetchall()
            )
        last = int(self._db.execute("SELECT COALESCE(MAX(id), 0) FROM questions").fetchone()[0])
        new = [prompt for prompt in options if prompt not in known]
        rows = [(last + i, prompt, judge, " ".join(map(str, options[prompt]))) for i, prompt in enumerate(new, 1)]
        self._db.executemany("INSERT INTO questions VALUES (?, ?, ?, ?)", rows)
        return known | {prompt: row for row, prompt, _, _ in rows}

    def _failure(self, verdict: Verdict) -> int:
        message = verdict.failure or "missing"
        self._db.execute("INSERT OR IGNORE INTO failures (kind, message) VALUES (?, ?)", (kind_of(message), message))
        return int(self._db.execute("SELECT id FROM failures WHERE message = ?", (message,)).fetchone()[0])

    def _passages(self, context: Context) -> int:
        values = (context.digest, context.texts)
        self._db.execute("INSERT OR IGNORE INTO passages (digest, texts) VALUES (?, ?)", values)
        return int(self._db.execute("SELECT id FROM passages WHERE digest = ?", values[:1]).fetchone()[0])


@contextmanager
def sqlite_errors(path: Path, done: str) -> Iterator[None]:
    """What SQLite complains of within the block becomes a DataError. ``done``: "read" or "written"."""
    try:
        yield
    except sqlite3.Error as error:
        raise DataError(
            f"judge-ledger {path} cannot be {done} ({error}): give it room and rights, and resume; a damaged file "
            "can be moved away, and what stood in it is asked again"
        ) from error


def check_format(db: sqlite3.Connection, path: Path, allow_empty: bool = False) -> int:
    """Format of a file, 0 if it is empty. Raises DataError for another than ours."""
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    tables = int(db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0])
    if found == FORMAT or (allow_empty and found == 0 and not tables):
        return found
    raise DataError(f"judge-ledger {path} has format {found}, not {FORMAT}: name another file")


def raw_text(db: sqlite3.Connection, batch: int, place: int | None) -> str:
    """What was said, word for word; "" where it is not kept."""
    if place is None:
        return ""
    (frame,) = db.execute("SELECT raw FROM batches WHERE id = ?", (batch,)).fetchone()
    return str(decompressed(frame)[place])


def chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]


def marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))
