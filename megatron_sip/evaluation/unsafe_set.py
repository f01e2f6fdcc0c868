"""The unsafe test set: prefixes that the safety judge calls unsafe in every one of its votes (paper, appendix B.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_sip.errors import DataError, JudgeError
from megatron_sip.files import cannot_write, make_folder
from megatron_sip.teacher.http.failures import TRANSPORT
from megatron_sip.teacher.interfaces import JudgeGroup, JudgeRequest, JudgeResult, Passage, Teacher
from megatron_sip.types import Sample

UNSAFE, SAFE, MIXED, MISSING = "unsafe", "safe", "mixed", "missing"


@dataclass(frozen=True)
class PrefixVerdict:
    """What the judge says of one prefix."""

    sample: int
    """Position in the stream of samples."""
    document: int
    num_votes: int
    """Votes that were given."""
    num_unsafe: int
    verdict: str
    """``unsafe`` or ``safe`` if all votes were given and agree, ``mixed`` if they differ, ``missing`` if one failed."""
    prefix: str = ""
    """Its text, for the reader, if it is unsafe."""


def verdict_of(num_votes: int, num_unsafe: int, num_asked: int) -> str:
    """A failed vote is missing, whatever the others say: it is no vote for either side."""
    if num_votes < num_asked:
        return MISSING
    return UNSAFE if num_unsafe == num_asked else SAFE if num_unsafe == 0 else MIXED


class Journal:
    """All verdicts so far, a line each, below a line that says what was asked. A later line replaces an earlier one."""

    def __init__(self, path: Path, question: Mapping[str, Any]) -> None:
        """Open, or begin. Raises ``DataError`` for another file, or if it was begun with another question."""
        self.path = path
        self.verdicts: dict[int, PrefixVerdict] = {}
        head = orjson.dumps({"question": question}, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SORT_KEYS)
        make_folder(path.parent)
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]  # what a killed run did not finish is cut off
        if not whole:
            try:
                path.write_bytes(head)
            except OSError as error:
                raise cannot_write(path, error) from None
            return
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        first, *lines = whole.splitlines()
        if first != head.strip():
            raise DataError(f"{path}: begun with other options ({first[:300].decode(errors='replace')}); name another")
        try:
            for line in lines:
                verdict = PrefixVerdict(**orjson.loads(line))
                self.verdicts[verdict.sample] = verdict
        except (orjson.JSONDecodeError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); delete it and run again") from error

    def add(self, verdicts: Sequence[PrefixVerdict]) -> None:
        self.verdicts |= {verdict.sample: verdict for verdict in verdicts}
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(orjson.dumps(v, option=orjson.OPT_APPEND_NEWLINE) for v in verdicts))
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def is_done(self, sample: int) -> bool:
        """Whether a prefix has all its votes."""
        return sample in self.verdicts and self.verdicts[sample].verdict != MISSING

    @property
    def counts(self) -> Counter[str]:
        """Prefixes per verdict."""
        return Counter(verdict.verdict for verdict in self.verdicts.values())

    def kept(self, most: int) -> list[int]:
        """The first unsafe prefixes of the stream."""
        return sorted(n for n, verdict in self.verdicts.items() if verdict.verdict == UNSAFE)[:most]


@dataclass
class UnsafeSearch:
    """Goes through the samples of a corpus in their order until enough prefixes are found."""

    teacher: Teacher
    read: Callable[[int, int], Sequence[Sample]]
    """(first, count) -> the samples from a position of the stream on."""
    decode: Callable[[Any], str]
    num_votes: int
    journal: Journal
    failures: Counter[str] = field(default_factory=Counter)
    """Failed votes of this run, per kind."""

    async def run(self, num_samples: int, num_wanted: int, at_a_time: int, log: Callable[[str], None]) -> None:
        """Ask for whatever is not in the journal yet, ``at_a_time`` prefixes at once.

        Raises ``JudgeError`` when nothing of a round comes through to the judge: the rest would not either.
        """
        for first in range(0, num_samples, at_a_time):
            samples = self.read(first, min(at_a_time, num_samples - first))
            # Ended where an undisturbed run would end: after the same samples.
            to_ask = [sample for sample in samples if not self.journal.is_done(sample.sample_id)]
            if to_ask:
                self.journal.add(await self._judge(to_ask))
                counts = self.journal.counts
                log(f"{first + len(samples):,} of {num_samples:,} prefixes: " + counts_text(counts))
            if self.journal.counts[UNSAFE] >= num_wanted:
                return

    async def _judge(self, samples: Sequence[Sample]) -> list[PrefixVerdict]:
        groups = []
        for sample in samples:
            prefix = Passage(np.asarray(sample.prefix), self.decode(sample.prefix))
            # The judge is shown the candidate alone: here the prefix.
            groups.append(JudgeGroup(sample.sample_id, prefix, Passage(np.zeros(0, int), ""), (prefix,), ("suffix",)))
        result = await self.teacher.judge(JudgeRequest(tuple(groups), learn=False))
        self.failures.update(result.failures)
        verdicts = self._verdicts(samples, groups, result)
        if set(result.failures) == {TRANSPORT} and not any(verdict.num_votes for verdict in verdicts):
            raise JudgeError(
                f"none of {result.failures[TRANSPORT]:,} requests came through to the judge: see that its servers run, "
                "then give the same command again"
            )
        return verdicts

    def _verdicts(
        self, samples: Sequence[Sample], groups: Sequence[JudgeGroup], result: JudgeResult
    ) -> list[PrefixVerdict]:
        found = []
        for sample, group, judged in zip(samples, groups, result.groups, strict=True):
            mean = float(judged.criteria["safety"][0])
            given = self.num_votes - judged.num_failures
            unsafe = round((1.0 - mean) * given) if given else 0
            verdict = verdict_of(given, unsafe, self.num_votes)
            text = group.prefix.text if verdict == UNSAFE else ""
            found.append(PrefixVerdict(sample.sample_id, sample.document, given, unsafe, verdict, text))
        return found


def counts_text(counts: Mapping[str, int]) -> str:
    """Counts of verdicts for the log."""
    return ", ".join(f"{counts.get(name, 0):,} {name}" for name in (UNSAFE, MIXED, SAFE, MISSING))
