"""From documents cut in two to the examples of tools/make_judge_data.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sip.data.example_files import ExampleFiles
from megatron_sip.errors import JudgeError
from megatron_sip.teacher.corrupter import Corrupter
from megatron_sip.teacher.http.failures import REJECTED, SERVER, TRANSPORT, kind_of
from megatron_sip.teacher.interfaces import Judge, JudgeGroup, Question, RewriteItem

LABELS = {"quality": ("1", "2"), "safety": ("safe", "unsafe"), "rewrite": ("safe", "unsafe")}
KINDS, SPLITS = tuple(LABELS), ("train", "valid")
_SERVERS = (TRANSPORT, SERVER, REJECTED)
"""Failures that speak of the servers or of how they are asked, not of a document."""


@dataclass(frozen=True)
class Cut:
    """A document's one sample, and what it is to become."""

    kind: str
    split: str
    source: str
    item: RewriteItem
    """Its number is that of the document's line, over all files."""


class Maker:
    """From cuts to examples, until there are enough of each."""

    def __init__(
        self,
        wanted: Callable[[str, str], int],
        safety_votes: int,
        writer: ExampleFiles,
        corrupter: Corrupter,
        safety: Judge | None,
    ) -> None:
        """``wanted``: examples to make of a kind and split."""
        self._wanted = wanted
        self._votes = safety_votes
        self._writer = writer
        self._corrupter = corrupter
        self._safety = safety

    @property
    def finished(self) -> bool:
        return not any(self.open_kinds(split) for split in SPLITS)

    @property
    def num_made(self) -> int:
        return sum(self._writer.counts.values())

    @property
    def waiting(self) -> dict[int, str]:
        """Why the servers gave no answer, by the line of the document that is to be asked about again."""
        return self._writer.waiting

    @property
    def next_line(self) -> int:
        """The first that was not read yet."""
        return self._writer.next_line

    def open_kinds(self, split: str) -> list[str]:
        """Kinds of which there are not enough yet."""
        return [kind for kind in KINDS if self._made(kind, split) < self._wanted(kind, split)]

    def _made(self, kind: str, split: str) -> int:
        return sum(count for name, count in self._writer.counts.items() if name.startswith(f"{kind} {split} "))

    def drop(self, reason: str) -> None:
        """Counts a document that becomes no example; recorded with the next batch."""
        self._writer.dropped[reason] += 1

    async def make(self, cuts: Sequence[Cut], next_line: int) -> None:
        """Asks about a batch of documents and writes what comes of it; those that the servers did not answer for wait.

        Raises JudgeError, with nothing of the batch recorded, if no server could be reached, or if most of the
        questions about documents that are read for the first time got no answer.
        """
        writer = self._writer
        before = writer.counts.copy(), writer.dropped.copy(), writer.waiting.copy()
        # Those that wait are few, and may be those that a server fails at: they must not end each run at its start.
        again = all(cut.item.sample_id in writer.waiting for cut in cuts)
        quality = [cut for cut in cuts if cut.kind == "quality"]
        others = [cut for cut in cuts if cut.kind != "quality"]
        try:
            records = await self._quality(quality, again) + await self._safe_and_unsafe(others, again)
        except JudgeError:
            writer.counts, writer.dropped, writer.waiting = before
            raise
        writer.write(records, next_line)

    def _must_wait(self, cut: Cut, failures: Sequence[str]) -> bool:
        """Whether a server's failure left the document without an answer; it is asked about again then."""
        line = cut.item.sample_id
        self._writer.waiting.pop(line, None)
        failed = [failure for failure in failures if _is_servers(failure)]
        if failed:
            self._writer.waiting[line] = failed[0]
        return bool(failed)

    async def _quality(self, cuts: Sequence[Cut], again: bool) -> list[tuple[str, dict[str, Any]]]:
        records = []
        corruptions = await self._corrupter.corrupt([cut.item for cut in cuts]) if cuts else []
        _require_answers([corruption.failure for corruption in corruptions], again)
        for cut, corruption in zip(cuts, corruptions, strict=True):
            if self._must_wait(cut, [corruption.failure]):
                continue
            if corruption.text is None:
                self._writer.dropped[f"quality: {_reason(corruption.failure)}"] += 1
                continue
            if self._made("quality", cut.split) >= self._wanted("quality", cut.split):
                continue
            for label in (1, 2):
                options = [cut.item.suffix.text, corruption.text]
                record = {"task": "quality", "document": cut.item.sample_id, "source": cut.source}
                record |= {"prefix": cut.item.prefix.text, "options": options if label == 1 else options[::-1]}
                record |= {"label": label, "corruption": corruption.kind}
                self._writer.counts[f"quality {cut.split} {label}"] += 1
                records.append((f"quality.{cut.split}.jsonl", record))
        return records

    async def _safe_and_unsafe(self, cuts: Sequence[Cut], again: bool) -> list[tuple[str, dict[str, Any]]]:
        if not cuts:
            return []
        assert self._safety is not None
        votes = self._votes
        questions = [Question(_alone(cut.item), (0,), vote) for cut in cuts for vote in range(votes)]
        verdicts = await self._safety.ask(questions)
        _require_answers([verdict.failure for verdict in verdicts], again)
        records = []
        for index, cut in enumerate(cuts):
            given = verdicts[index * votes : (index + 1) * votes]
            if self._must_wait(cut, [verdict.failure for verdict in given]):
                continue
            scores = {verdict.score for verdict in given}
            failed = [verdict for verdict in given if verdict.score != verdict.score]
            if failed or len(scores) > 1 or scores - {0.0, 1.0}:
                reason = kind_of(failed[0].failure) if failed else "votes differ"
                self._writer.dropped[f"{cut.kind}: {reason}"] += 1
                continue
            label = "safe" if scores == {1.0} else "unsafe"
            name = f"{cut.kind} {cut.split} {label}"
            if self._writer.counts[name] >= self._wanted(cut.kind, cut.split) // 2:
                self._writer.dropped[f"{cut.kind}: enough {label}"] += 1
                continue
            self._writer.counts[name] += 1
            record = {"task": cut.kind, "document": cut.item.sample_id, "source": cut.source, "label": label}
            if cut.kind == "safety":
                record["text"] = cut.item.suffix.text
            else:
                record |= {"prefix": cut.item.prefix.text, "suffix": cut.item.suffix.text}
            records.append((f"{cut.kind}.{cut.split}.jsonl", record))
        return records


def _is_servers(failure: str) -> bool:
    return bool(failure) and kind_of(failure) in _SERVERS


def _require_answers(failures: Sequence[str], again: bool) -> None:
    """Raises JudgeError if a server could not be reached or, unless all are asked ``again``, if more than half of the
    questions were answered by an error: there is no use in going on."""
    failed = [failure for failure in failures if _is_servers(failure)]
    unreached = any(kind_of(failure) == TRANSPORT for failure in failed)
    if unreached or (2 * len(failed) > len(failures) and not again):
        raise JudgeError(
            f"{len(failed)} of {len(failures)} questions got no answer ({failed[-1]}): see to the servers and the "
            "--judge-... flags, then repeat the command; what is made is kept"
        )


def _reason(failure: str) -> str:
    """The kind of an HTTP failure, which quotes what differs from case to case; a rule's words as they are."""
    return kind_of(failure) if kind_of(failure) != "other" else failure


def _alone(item: RewriteItem) -> JudgeGroup:
    return JudgeGroup(item.sample_id, item.prefix, item.suffix, (item.suffix,), ("suffix",))
