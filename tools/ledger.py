"""Reads the ledger of a run: every verdict that judges and rewriter gave.

    tools/ledger.py summary runs/x/ledger.sqlite
    tools/ledger.py query   runs/x/ledger.sqlite --failure any --steps 100:200
    tools/ledger.py show    runs/x/ledger.sqlite --criterion quality --scores 0:0.5 --limit 3
    tools/ledger.py export  runs/x/ledger.sqlite --output verdicts.parquet

The path is that of --judge-ledger: all replicas and all files of it are read. A file or a directory will do, too.
"""

from __future__ import annotations

import argparse
import itertools
import sqlite3
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import orjson

from megatron_sip.errors import SIPError
from megatron_sip.teacher.ledger import REWRITER
from megatron_sip.teacher.ledger.export import export_parquet
from megatron_sip.teacher.ledger.reading import FAILURE_FILTERS, Filter, JudgeSummary, Reader, Row

_SHOWN = ("criterion", "step", "sample_id", "options", "vote", "score", "failure", "latency_s", "model", "prompt")
CRITERIA = ("quality", "safety", "factuality", "coherence", REWRITER)
_PREFIX_CHARACTERS = 400
_Number = TypeVar("_Number", int, float)


def between(kind: Callable[[str], _Number]) -> Callable[[str], tuple[_Number, _Number]]:
    """``A:B`` or a single value."""

    def parse(text: str) -> tuple[_Number, _Number]:
        low, colon, high = text.partition(":")
        try:
            ends = kind(low), kind(high if colon else low)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no range: write LOW:HIGH, or one number") from None
        if ends[0] > ends[1]:
            raise argparse.ArgumentTypeError(f"{text!r} is empty: write the lower end first")
        return ends

    return parse


class Parser(argparse.ArgumentParser):
    """Bad input is answered in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (--help lists the options)\n")


def parser() -> Parser:
    """Of the whole command line."""
    outer = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = outer.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in (
        ("summary", "votes, missing ones by kind of failure, scores, latencies and cache hits of each judge"),
        ("query", "one line per verdict"),
        ("show", "questions and answers in full, where their words were kept (--ledger-raw)"),
        ("export", "one Parquet file"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("ledger", type=Path, help="path of --judge-ledger, or one of its files")
        command.add_argument("--criterion", choices=CRITERIA, default="", help="one criterion, or the rewriter")
        command.add_argument("--judge", default="", metavar="TEXT", help="part of the judge's or the model's name")
        command.add_argument("--scores", type=between(float), metavar="LOW:HIGH", help="range of scores, ends included")
        command.add_argument("--steps", type=between(int), metavar="FIRST:LAST", help="range of training steps")
        command.add_argument("--sample", type=int, metavar="ID", help="one sample")
        command.add_argument(
            "--failure", choices=FAILURE_FILTERS, default="", help="missing verdicts: any, none of them, or one kind"
        )
        if name in ("query", "show"):
            command.add_argument(
                "--limit", type=int, default=50 if name == "query" else 3, help="at most [%(default)s]"
            )
        if name == "query":
            command.add_argument(
                "--json", action="store_true", help="all columns and the words, one JSON object a line"
            )
        if name == "export":
            command.add_argument("--output", type=Path, required=True, metavar="FILE.parquet")
            command.add_argument("--no-raw", action="store_true", help="leave out what was said")
    return outer


def summary(reader: Reader, chosen: Filter) -> None:
    """A block of lines per judge."""
    found = reader.summary(chosen)
    print(f"{reader.num_files} file{'s' * (reader.num_files != 1)}, {reader.num_bytes / 2**20:.1f} MiB")
    if not found:
        print("no such verdict")
    for (criterion, judge, model), entry in sorted(found.items()):
        print(f"\n{criterion}: {judge}, model {model}")
        for name, value in _figures(entry, is_scored=criterion != REWRITER):
            print(f"  {name:<14}{value}")


def _figures(entry: JudgeSummary, is_scored: bool) -> list[tuple[str, str]]:
    missing = sum(entry.failures.values())
    share = f" ({missing / entry.votes:.2%})" if entry.votes else ""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(entry.failures.items()))
    asked = entry.votes + entry.hits
    figures = [
        ("votes", str(entry.votes)),
        ("missing", f"{missing}{share}" + (f": {kinds}" if kinds else "")),
        ("mean score", f"{entry.total / entry.answered:.4f}" if entry.answered and is_scored else "-"),
        ("cache hits", f"{entry.hits}" + (f" ({entry.hits / asked:.2%} of what was asked)" if asked else "")),
    ]
    shares = (0.5, 0.9, 0.99, 1.0)
    if entry.votes:
        seconds = zip(("p50", "p90", "p99", "max"), entry.percentiles(shares), strict=True)
        figures.append(("latency", "  ".join(f"{name} {value:.3g} s" for name, value in seconds)))
    return figures


def query(reader: Reader, chosen: Filter, limit: int, as_json: bool) -> None:
    """A table, or JSON lines."""
    rows = itertools.islice(reader.rows(chosen, with_raw=as_json), limit)
    if as_json:
        for row in rows:
            print(orjson.dumps({"replica": row.replica, **row.values, "raw": row.raw}).decode())
        return
    table = [_SHOWN, *(tuple(_cell(row, name) for name in _SHOWN) for row in rows)]
    if len(table) == 1:
        print("no such verdict")
        return
    widths = [max(len(line[column]) for line in table) for column in range(len(_SHOWN))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(row: Row, name: str) -> str:
    value = row.values[name]
    if value is None:
        return "-"
    if name in ("model", "prompt"):
        return str(value)[:16]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(reader: Reader, chosen: Filter, limit: int) -> None:
    """Each question with its texts, then all of its votes."""
    rows = reader.rows(chosen, with_raw=True, with_passages=True)
    questions = itertools.groupby(rows, key=lambda row: (row.values["prompt"], row.values["criterion"], row.passages))
    shown = 0
    for _, votes in itertools.islice(questions, limit):
        show_question(list(votes))
        shown += 1
    if not shown:
        print("no such verdict whose words were kept: --ledger-raw decides at recording whose are")


def show_question(votes: Sequence[Row]) -> None:
    values, texts = votes[0].values, votes[0].passages
    assert texts is not None
    step = "" if values["step"] is None else f", step {values['step']}"
    print("=" * 100)
    print(f"{values['criterion']} of sample {values['sample_id']}{step}, by {values['judge']}, model {values['model']}")
    prefix = texts["prefix"]
    print("\nPREFIX" + (f" (its last {_PREFIX_CHARACTERS} characters)" if len(prefix) > _PREFIX_CHARACTERS else ""))
    print(_indented(prefix[-_PREFIX_CHARACTERS:]))
    for number, option in enumerate(map(int, values["options"].split()), 1):
        print(f"\nOPTION {number}: candidate {option}, {texts['kinds'][option]}")
        print(_indented(texts["candidates"][option]))
    if not values["options"]:
        print("\nSUFFIX\n" + _indented(texts["candidates"][0]))
    for vote in votes:
        score, failure = vote.values["score"], vote.values["message"]
        verdict = f"MISSING ({failure})" if failure else f"score {score:g}"
        print(f"\nVOTE {vote.values['vote']}: {verdict}, after {vote.values['latency_s']:.3g} s")
        if vote.raw:
            print(_indented(vote.raw))
    print()


def _indented(text: str) -> str:
    wrapped = [textwrap.wrap(line, 96, drop_whitespace=False) or [""] for line in text.splitlines()]
    return "\n".join(f"    {line.rstrip()}" for lines in wrapped for line in lines)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    own = parser().parse_args(argv)
    chosen = Filter(own.criterion, own.judge, own.scores, own.failure, own.steps, own.sample)
    try:
        reader = Reader(own.ledger)
        if own.command == "summary":
            summary(reader, chosen)
        elif own.command == "query":
            query(reader, chosen, own.limit, own.json)
        elif own.command == "show":
            show(reader, chosen, own.limit)
        else:
            count = export_parquet(reader, chosen, own.output, with_raw=not own.no_raw)
            print(f"wrote {count} verdicts to {own.output}")
        reader.close()
    except SIPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except sqlite3.Error as error:
        print(f"error: ledger {own.ledger} cannot be read ({error}): one of its files is damaged", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
