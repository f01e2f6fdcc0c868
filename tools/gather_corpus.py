#!/usr/bin/env python
"""Gather a corpus of real text without a download: documentation and docstrings of installed Python packages.

Writes one <split>.jsonl per split ({"text", "id", "source"}), which share no document, and sources.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.gather import DEFAULT_PACKAGES, DEFAULT_SPLITS, GatherReport, gather
from megatron_sip.data.splits import parse_shares
from megatron_sip.errors import DataError
from tools._exit import one_line
from tools._help import HelpFormatter, Parser


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for <split>.jsonl and sources.json")
    parser.add_argument(
        "--packages", nargs="+", default=list(DEFAULT_PACKAGES), help="packages to read; stdlib is Python itself"
    )
    parser.add_argument(
        "--text-dir",
        type=Path,
        nargs="*",
        default=[],
        help="folders of .txt, .rst and .md files to add (see tools/fetch_debian_prose.py)",
    )
    shares = ",".join(f"{name}:{share}" for name, share in DEFAULT_SPLITS.items())
    parser.add_argument("--splits", default=shares, help=f"name:share,... (default: {shares})")
    parser.add_argument("--min-chars", type=int, default=1500, help="join neighbours up to so many characters")
    parser.add_argument("--keep-prompts", action="store_true", help="keep interpreter sessions (>>> ...)")
    parser.add_argument("--min-megabytes", type=float, default=5.0, help="fail if less text than this is found")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    return parser.parse_args()


def show(report: GatherReport, elapsed_s: float) -> None:
    """Print what each package and each split got."""
    for name, count in sorted(report.sources.items(), key=lambda item: -item[1].num_chars):
        print(
            f"  {name:20} {count.version:12} {count.num_files:6} files {count.num_documents:6} documents "
            f"{count.num_chars / 1e6:7.2f} M characters"
        )
    if report.missing:
        print(f"  not installed: {', '.join(report.missing)}")
    for line in report.unreadable:
        print(f"  not read: {line}")
    for split, num_documents in report.documents.items():
        print(f"{split:12} {num_documents:6} documents {report.num_bytes[split] / 1e6:7.2f} MB")
    print(
        f"{report.total_bytes / 1e6:.1f} MB in {elapsed_s:.0f} s; "
        f"{report.num_removed_chars / 1e6:.1f} M characters of repetitions left out"
    )


def main() -> None:
    """Gather, report, and fail if there is too little."""
    options = parse_arguments()
    started = time.monotonic()
    with one_line("gather_corpus"):
        report = gather(
            options.output_dir,
            options.packages,
            parse_shares(options.splits),
            options.text_dir,
            options.min_chars,
            options.keep_prompts,
            options.workers,
        )
        show(report, time.monotonic() - started)
        if report.total_bytes < options.min_megabytes * 1e6:
            raise DataError(
                f"only {report.total_bytes / 1e6:.1f} MB of text found, --min-megabytes {options.min_megabytes}: "
                "install more packages, or add text by --text-dir"
            )


if __name__ == "__main__":
    main()
