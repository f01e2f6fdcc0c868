#!/usr/bin/env python
"""Fuzzed input files, 10,000 by default: every line accounted for, or an error with file and line."""

from __future__ import annotations

import argparse
import gzip
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import zstandard

from megatron_sip.data.readers import ReadConfig, read_file
from megatron_sip.data.records import BrokenLine, parse_batch
from megatron_sip.errors import DataError
from tests.data.fuzz import fuzzed_file


def lines_of(path: Path, rule: str, max_line_bytes: int = 100_000) -> tuple[int, int, int] | str:
    """(documents, blank, broken) of a file, or the message of its error."""
    read = ReadConfig(utf8_errors=rule, max_line_bytes=max_line_bytes)
    documents = blank = broken = 0
    try:
        for batch in read_file(path, read):
            for item in parse_batch(batch, ("text",), read):
                documents += item is not None and not isinstance(item, BrokenLine)
                blank += item is None
                broken += isinstance(item, BrokenLine)
    except DataError as error:
        return str(error)
    return documents, blank, broken


LONG = 50_000_000


def long_lines(folder: Path) -> int:
    """Lines of 50 MB, whole and broken, between good ones, in every compression: returns how many files were right."""
    good = b'{"text": "good"}\n'
    middles = {
        "a document": (b'{"text": "' + b"x" * LONG + b'"}\n', 600_000_000, (3, 0, 0)),
        "broken": (b'{"text": "' + b"x" * LONG + b"\n", 600_000_000, (2, 0, 1)),
        "too long": (b'{"text": "' + b"x" * LONG + b'"}\n', 40_000_000, (2, 0, 1)),
    }
    count = 0
    for name, (middle, most, expected) in middles.items():
        raw = good + middle + good
        for suffix, packed in (("", raw), (".gz", gzip.compress(raw, 1)), (".zst", zstandard.compress(raw, 1))):
            path = folder / f"long.jsonl{suffix}"
            path.write_bytes(packed)
            found = lines_of(path, "fail", most)
            if found != expected:
                sys.exit(f"{name} of 50 MB in {path.name}: {found}, not {expected}")
            count += 1
    return count


def main() -> None:
    """Run, count, and fail at the first line that is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    started = time.monotonic()
    totals = np.zeros(3, dtype=np.int64)
    kinds: Counter[str] = Counter()
    num_refused = num_lines = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.files):
            lines, packed, suffix, is_damaged = fuzzed_file(rng)
            path = Path(folder) / f"fuzzed.jsonl{suffix}"
            path.write_bytes(packed)
            found = lines_of(path, ("fail", "replace", "ignore")[number % 3])
            if isinstance(found, str):
                if not is_damaged or f"{path}: damaged or truncated after " not in found:
                    sys.exit(f"file {number}: {found}")
                num_refused += 1
                kinds[suffix] += 1
                continue
            if is_damaged or sum(found) != len(lines):
                sys.exit(f"file {number}: {found} of {len(lines)} lines, damaged: {is_damaged}")
            totals += found
            num_lines += len(lines)
            kinds[suffix or "plain"] += 1
        num_long = long_lines(Path(folder))
    print(
        f"{options.files:,} files in {time.monotonic() - started:.0f} s: {num_refused:,} damaged archives refused; "
        f"{num_lines:,} lines = {totals[0]:,} documents + {totals[1]:,} blank + {totals[2]:,} broken"
    )
    print(", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())) + f"; {num_long} with a 50 MB line")
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at most")


if __name__ == "__main__":
    main()
