#!/usr/bin/env python
"""Prove that splits share no document and no near copy, and write what to leave out where they do.

Splits are cut by the hash of each document's text: preprocess_data.py --splits policy:0.8,judge:0.2 --split policy.
    split_corpus.py --split policy=corpus/a.jsonl --split judge=corpus/b/ [--write-exclusions FOLDER]
    split_corpus.py --input corpus/ --splits policy:0.8,judge:0.1,test:0.1 [--write-exclusions FOLDER]
FOLDER/<split>.txt is for tools/preprocess_data.py --exclude. The exit status is 1 if splits overlap.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.readers import FORMATS, UTF8_RULES, ReadConfig, expand_inputs, read_file
from megatron_sip.data.records import BrokenLine, Record, parse_batch
from megatron_sip.data.splits import OverlapReport, document_key, parse_shares, search_overlap, split_of
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.files import make_folder, write_text
from tools._exit import one_line
from tools._help import HelpFormatter, Parser


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--split", action="append", default=[], metavar="NAME=PATH", help="files of a split; repeat it")
    parser.add_argument("--input", nargs="+", default=[], help="a corpus to cut by --splits")
    parser.add_argument("--splits", help="name:share,... such as policy:0.9,test:0.1")
    parser.add_argument("--split-key", default="text", help="what --splits hashes: text, or a field such as url")
    parser.add_argument("--json-key", default="text", help="the field that holds the text")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="auto: by the files' suffixes")
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail", help="at a broken line stop, or leave it out and say so"
    )
    parser.add_argument(
        "--utf8-errors", choices=UTF8_RULES, default="fail", help="text that is not UTF-8: as in preprocess_data.py"
    )
    parser.add_argument("--ngram", type=int, default=8, help="words that must agree in a row")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="part of a document's n-grams that makes it a copy"
    )
    parser.add_argument("--sample-rate", type=float, default=1.0, help="part of the n-grams to keep (12 bytes each)")
    parser.add_argument("--write-exclusions", type=Path, help="folder for <split>.txt of text hashes to leave out")
    options = parser.parse_args()
    if bool(options.split) == bool(options.input) or bool(options.input) != bool(options.splits):
        parser.error("give --split NAME=PATH for each split, or --input and --splits")
    return options


def records(path: Path, options: argparse.Namespace) -> Iterator[Record]:
    """Documents of a file. Raises ``DataError`` for a broken line under ``--on-error fail``."""
    read = ReadConfig(format=options.format, signals="none", utf8_errors=options.utf8_errors)
    for batch in read_file(path, read):
        for item in parse_batch(batch, (options.json_key,), read):
            if isinstance(item, BrokenLine):
                if options.on_error == "fail":
                    raise DataError(f"{path}:{item.number}: {item.message}; or leave it out with --on-error skip")
                print(f"left out: {path}:{item.number}: {item.message}", file=sys.stderr)
            elif item is not None:
                yield item


def split_names(options: argparse.Namespace) -> list[str]:
    """The splits that are named. Raises ``ConfigurationError`` for fewer than two: they prove nothing."""
    if options.input:
        names = list(parse_shares(options.splits))
    else:
        names = list(dict.fromkeys(entry.partition("=")[0] for entry in options.split))
    if len(names) < 2:
        raise ConfigurationError(f"only the split {names[0]!r} is named: give two or more to compare")
    for name in names:
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise ConfigurationError(f"split {name!r}: a name is made of letters, digits, dots, - and _")
    return names


def documents(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(split, file and line, text) of everything."""
    for entry in options.split:
        name, equals, pattern = entry.partition("=")
        if not (name and equals and pattern):
            raise ConfigurationError(f"--split {entry}: write NAME=PATH")
        for path in expand_inputs([pattern]):
            for record in records(path, options):
                yield name, f"{path}:{record.number}", record.texts[0]
    if options.input:
        shares = parse_shares(options.splits)
        for path in expand_inputs(options.input):
            for record in records(path, options):
                try:
                    split = split_of(document_key(record, options.split_key), shares)
                except ValueError as error:
                    raise DataError(f"{path}:{record.number}: {error}") from error
                yield split, f"{path}:{record.number}", record.texts[0]


def show(report: OverlapReport, options: argparse.Namespace) -> None:
    """The proof, or what contradicts it."""
    for name, count in report.num_documents.items():
        print(f"{name}: {count:,} documents")
    print(
        f"compared {report.num_hashes:,} {options.ngram}-grams; {report.num_unsampled:,} documents by exact text only"
    )
    for found in report.overlapping[:20]:
        kind = "the same text" if found.is_exact else f"{100 * found.share:.0f} % of its {options.ngram}-grams"
        print(f"  {found.split} {found.name}: {kind} in another split")
    exact = sum(found.is_exact for found in report.overlapping)
    print(f"{exact:,} exact and {len(report.overlapping) - exact:,} near copies across splits")


def main() -> None:
    """Compare, report, and fail if splits overlap."""
    options = parse_arguments()
    with one_line("split_corpus"):
        names = split_names(options)
        if options.write_exclusions is not None:
            make_folder(options.write_exclusions)
        report = search_overlap(documents(options), options.ngram, options.sample_rate, options.threshold)
        for name in names:
            if not report.num_documents.get(name):
                raise DataError(f"split {name!r} has no document: nothing is proved; give it files, or leave it out")
        show(report, options)
        if options.write_exclusions is not None:
            for name, hashes in report.exclusions.items():
                write_text(options.write_exclusions / f"{name}.txt", "".join(f"{text}\n" for text in hashes))
                print(f"leave {len(hashes):,} out of {name}: --exclude {options.write_exclusions / name}.txt")
    if report.overlapping:
        sys.exit(1)


if __name__ == "__main__":
    main()
