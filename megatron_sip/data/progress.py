"""Where every input line went, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_sip.data.encode import EncodedBatch
from megatron_sip.errors import DataError

_MAX_SHOWN = 20


@dataclass
class PreprocessReport:
    """``num_lines`` = ``num_documents`` + ``num_blank`` + ``num_errors`` + all of ``dropped``."""

    num_lines: int = 0
    num_documents: int = 0
    """Lines that hold a document; one without text is in ``num_empty`` of its field besides."""
    num_blank: int = 0
    """Lines of white space."""
    num_errors: int = 0
    """Lines left out because they are broken."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents that each rule of the filter dropped."""
    num_empty: dict[str, int] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    num_text_bytes: int = 0
    errors: list[str] = field(default_factory=list)
    """The first errors, with file and line."""
    elapsed_s: float = 0.0

    def count(self, batch: EncodedBatch, on_error: str, json_keys: Sequence[str]) -> None:
        """Take in a batch. Raises ``DataError`` for a broken line unless such lines are to be skipped."""
        if batch.errors and on_error == "fail":
            raise DataError(f"{batch.errors[0]}; mend the line, or leave such lines out with --on-error skip")
        self.num_lines += batch.num_lines
        self.num_documents += batch.num_documents
        self.num_blank += batch.num_blank
        self.num_errors += len(batch.errors)
        self.num_text_bytes += batch.num_text_bytes
        for rule, count in batch.dropped.items():
            self.dropped[rule] = self.dropped.get(rule, 0) + count
        for key, column in zip(json_keys, batch.columns, strict=True):
            self.num_empty[key] = self.num_empty.get(key, 0) + column.num_empty
        self.errors += batch.errors[: max(0, _MAX_SHOWN - len(self.errors))]

    def add(self, other: PreprocessReport) -> None:
        """Add the counts of another part."""
        for name in ("num_lines", "num_documents", "num_blank", "num_errors", "num_text_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in (
            (self.dropped, other.dropped),
            (self.num_empty, other.num_empty),
            (self.num_tokens, other.num_tokens),
        ):
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0) + value
        self.errors += other.errors[: max(0, _MAX_SHOWN - len(self.errors))]


class Progress:
    """A line every ``interval`` input lines: speed and time to go."""

    def __init__(self, total_bytes: int, interval: int, log: Callable[[str], None]) -> None:
        self._total = total_bytes
        self._interval = interval
        self._next = interval
        self._log = log
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def show(self, report: PreprocessReport, num_tokens: int, num_bytes_read: int, what: str = "") -> None:
        """Log if enough lines have passed since the last time."""
        if report.num_lines < self._next:
            return
        self._next = report.num_lines + self._interval
        elapsed = max(self.elapsed_s, 1e-9)
        to_go = elapsed * (self._total - num_bytes_read) / max(num_bytes_read, 1)
        self._log(
            f"{what}{report.num_documents:,} documents ({100 * num_bytes_read / max(self._total, 1):.0f} %), "
            f"{report.num_text_bytes / elapsed / 1e6:.1f} MB/s, {num_tokens / elapsed:,.0f} tokens/s, "
            f"{report.num_errors} errors, {to_go:.0f} s to go"
        )
