"""The ledger of one replica, for writing: the file in use and those that are full."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.teacher.interfaces import JudgeIdentity, Verdict
from megatron_sip.teacher.ledger.files import segment_path, segments
from megatron_sip.teacher.ledger.records import Asked, Context, RawPolicy, is_missing
from megatron_sip.teacher.ledger.segment import NewVote, Segment

REWRITER = "rewriter"
"""Criterion under which rewrites are kept; their score is 1 for a copy of the suffix, else 0."""
_DEFAULT_LIMIT = 256 * 2**20


class Ledger:
    """A hundred votes on one question are a hundred rows: the vote index is part of the key."""

    def __init__(
        self, base: Path, replica: int = 0, raw: RawPolicy | None = None, limit_bytes: int = _DEFAULT_LIMIT
    ) -> None:
        """Open or create. ``limit_bytes``: size from which on a new file is begun. Raises DataError."""
        self._base = base
        self._replica = replica
        self._raw = raw or RawPolicy()
        self._limit = limit_bytes
        found = [segment for segment in segments(base) if segment.replica == replica]
        self._full = {segment.number: Segment(segment.path) for segment in found[:-1]}
        self._number = found[-1].number if found else 1
        self._active = self._open(next((s.ledger_id for s in self._full.values()), os.urandom(8).hex()))

    def find(
        self, criterion: str, identity: JudgeIdentity, asked: Collection[Asked], with_raw: bool = False
    ) -> dict[Asked, Verdict]:
        """The scores kept for these votes; a failure is not among them: it is worth asking again.

        ``with_raw``: with the words, where they are kept.
        """
        wanted = set(asked)
        found: dict[Asked, Verdict] = {}
        for segment in [self._active, *reversed(self._full.values())]:
            if missing := wanted - found.keys():
                found |= segment.find(criterion, identity, missing, with_raw)
        return {key: verdict for key, verdict in found.items() if key in wanted}

    def add(
        self,
        criterion: str,
        identity: JudgeIdentity,
        context: Context,
        votes: Sequence[tuple[Asked, tuple[int, ...], Verdict]],
        always_raw: bool = False,
    ) -> None:
        """Keep a batch about one context: it is in the file when this returns. ``always_raw``: what was said is what
        counts, as with a rewrite."""
        kept = self._raw.keeps(context.sample_id)
        failed = self._raw.keeps_failures
        new = [
            NewVote(asked, options, verdict, always_raw or kept or (failed and is_missing(verdict.score)))
            for asked, options, verdict in votes
        ]
        while not self._active.add(criterion, identity, context, new, texts=kept):
            self._next()
        if self._active.size >= self._limit:
            self._next()

    def add_hits(self, criterion: str, identity: JudgeIdentity, step: int | None, count: int) -> None:
        """Count votes that were answered from here."""
        while not self._active.add_hits(criterion, identity, step, count):
            self._next()

    def count(self) -> int:
        """Votes kept, failed ones included."""
        return sum(segment.count() for segment in [*self._full.values(), self._active])

    def state_dict(self) -> dict[str, Any]:
        """How far it is: what is written later belongs to steps after a checkpoint."""
        return {"ledger": self._active.ledger_id, "file": self._number, "batch": self._active.last_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Marks what is asked again as lost: its scores still answer, its failures did not happen.

        That is what was written after the checkpoint; the verdicts of steps that it has without them
        (``judged_again``), for these had not all come, their rewrites had; and steps that it has nothing of
        (``prepared_again``), which may have been begun.
        """
        if state.get("ledger") != self._active.ledger_id:
            return
        for number, segment in (self._full | {self._number: self._active}).items():
            if number >= state["file"]:
                segment.mark_lost(int(state["batch"]) if number == state["file"] else 0)
        judged, prepared = (tuple(state.get(name, ())) for name in ("judged_again", "prepared_again"))
        if not (judged or prepared):
            return
        # What is written while one of these steps is under way belongs to steps no further before it than these span.
        first = 2 * min(judged + prepared) - max(judged + prepared)
        for segment in [self._active, *reversed(self._full.values())]:
            if segment.last_batch and segment.last_step < first:
                break
            segment.mark_steps_lost(judged, but=REWRITER)
            segment.mark_steps_lost(prepared)

    def close(self) -> None:
        for segment in [*self._full.values(), self._active]:
            segment.close()

    def _open(self, ledger_id: str) -> Segment:
        return Segment(segment_path(self._base, self._replica, self._number), ledger_id)

    def _next(self) -> None:
        self._active.close_for_good()
        self._full[self._number] = self._active
        self._number += 1
        self._active = self._open(self._active.ledger_id)
