#!/usr/bin/env python
"""Tokenize documents (jsonl, RedPajama-V2, Parquet) into Megatron .bin/.idx corpora (Megatron-LM's flags and names).

One corpus:         --input corpus.jsonl --output-prefix data/corpus
A shard per file:   --input corpus/ --output-dir data/shards [--shard-index I --num-shards N] ; repeat it to go on
Then one corpus:    the same command with --merge --output-prefix data/corpus
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.dryrun import DryRun, dry_run
from megatron_sip.data.filters import UNSAFE_READINGS, FilterConfig
from megatron_sip.data.preprocess import PreprocessConfig, preprocess
from megatron_sip.data.progress import PreprocessReport
from megatron_sip.data.readers import FORMATS, UTF8_RULES, ReadConfig
from megatron_sip.data.sharded import NodePart, merge_shards, preprocess_shards
from megatron_sip.tokenizer.config import ENGINES
from tools._exit import one_line
from tools._help import HelpFormatter, Parser
from tools._tokenizer_flags import add_tokenizer_flags, tokenizer_config


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    data = parser.add_argument_group("input and output")
    data.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders (searched through) or quoted globs: .jsonl, .json, both also .gz or .zst, and .parquet",
    )
    data.add_argument(
        "--json-keys", nargs="+", default=["text"], help="fields to tokenize, by name or dotted path, one corpus each"
    )
    data.add_argument("--output-prefix", help="writes <prefix>_<key>_document.bin, .idx, .meta.json")
    data.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a broken line stop, or leave it out and count it",
    )
    data.add_argument(
        "--source-field", help="field with a document's source (meta.redpajama_set_name), for tools/inspect_data.py"
    )
    data.add_argument("--workers", type=int, default=1, help="processes that tokenize; at most one per core")
    data.add_argument("--log-interval", type=int, default=10_000, help="lines between progress lines")
    data.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="auto: by the files' suffixes; redpajama-v2: documents/ with quality_signals/ and duplicates/ beside it",
    )
    data.add_argument(
        "--signals",
        choices=("required", "optional", "none"),
        default="required",
        help="RedPajama-V2's quality signals: stop where a head or middle file has none, take it without, or read none",
    )
    data.add_argument(
        "--utf8-errors",
        choices=UTF8_RULES,
        default="fail",
        help="text that is not UTF-8: a broken line, U+FFFD in its place, or left out",
    )
    data.add_argument("--max-line-mb", type=float, default=512, help="a longer line counts as broken, in MB")
    data.add_argument(
        "--dry-run",
        type=int,
        metavar="LINES",
        help="show what the filter does to so many lines, spread over the files, and write nothing",
    )
    shards = parser.add_argument_group("shards")
    shards.add_argument("--output-dir", type=Path, help="one output shard per input file, resumable, with a manifest")
    shards.add_argument(
        "--shard-index", type=int, default=0, help="number of this node, from 0 (Slurm: $SLURM_ARRAY_TASK_ID)"
    )
    shards.add_argument(
        "--num-shards",
        type=int,
        default=1,
        help="number of nodes that share the files (Slurm: $SLURM_ARRAY_TASK_COUNT)",
    )
    shards.add_argument(
        "--verify", action="store_true", help="compare the checksums of finished shards, not only sizes"
    )
    shards.add_argument("--merge", action="store_true", help="join all shards of --output-dir into --output-prefix")
    _filter_flags(parser.add_argument_group("filter"))
    group = parser.add_argument_group("tokenizer")
    add_tokenizer_flags(group)
    group.add_argument(
        "--tokenizer-engine",
        choices=ENGINES,
        default="auto",
        help="what tokenizes: the tokenizer's own library; gigatoken (pip install gigatoken), which gives the same "
        "ids, is compared with the library, and is many times as fast; auto: gigatoken where it is installed and can",
    )
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    options = parser.parse_args()
    if options.output_prefix is None and (options.output_dir is None or options.merge) and options.dry_run is None:
        parser.error("give --output-prefix for one corpus, or --output-dir for one shard per input file")
    if options.output_prefix is not None and options.output_dir is not None and not options.merge:
        parser.error("give --output-prefix or --output-dir, or both with --merge")
    if options.merge and options.output_dir is None:
        parser.error("--merge joins the shards of --output-dir: give it")
    return options


def _filter_flags(group: argparse._ArgumentGroup) -> None:
    defaults = FilterConfig()
    group.add_argument("--languages", nargs="+", default=[], help="keep documents of these languages: en de ...")
    group.add_argument("--language-field", default=defaults.language_field, help="field with the language")
    group.add_argument("--buckets", nargs="+", default=[], help="keep these buckets of RedPajama-V2: head middle tail")
    group.add_argument("--bucket-field", default=defaults.bucket_field, help="field with the bucket")
    group.add_argument("--sets", nargs="+", default=[], help="keep these sets of SlimPajama: C4 Wikipedia ...")
    group.add_argument("--set-field", default=defaults.set_field, help="field with the set")
    group.add_argument("--drop-duplicates", action="store_true", help="leave out what RedPajama-V2's duplicates/ lists")
    group.add_argument(
        "--unsafe-subset",
        choices=UNSAFE_READINGS,
        default="off",
        help="keep the paper's unsafe subset of RedPajama-V2 as its code reads (curse words and blocklist), or as its "
        "text does (or)",
    )
    group.add_argument(
        "--gopher",
        action="store_true",
        help="keep what passes Gopher's quality rules (words, symbols, bullet points, stop words)",
    )
    group.add_argument(
        "--predicate", help="module:function of yours, called with the fields of a line (a dict), true to keep it"
    )
    group.add_argument(
        "--splits", help="name:share,... such as policy:0.9,test:0.1, cut by a stable hash; with --split"
    )
    group.add_argument("--split", help="keep this one of --splits")
    group.add_argument(
        "--split-key",
        default=defaults.split_key,
        help="what is hashed: text (the first of --json-keys), or a field such as url",
    )
    group.add_argument("--exclude", help="file of text hashes to leave out (tools/split_corpus.py writes them)")


def build_config(options: argparse.Namespace) -> PreprocessConfig:
    """The configuration that the flags name."""
    filters = FilterConfig(
        languages=tuple(options.languages),
        language_field=options.language_field,
        buckets=tuple(options.buckets),
        bucket_field=options.bucket_field,
        sets=tuple(options.sets),
        set_field=options.set_field,
        drop_duplicates=options.drop_duplicates,
        unsafe_subset=options.unsafe_subset,
        gopher=options.gopher,
        predicate=options.predicate,
        splits=options.splits,
        split=options.split,
        split_key=options.split_key,
        exclude=options.exclude,
    )
    return PreprocessConfig(
        inputs=tuple(options.input),
        output_prefix=options.output_prefix or "",
        tokenizer=tokenizer_config(options, options.tokenizer_engine),
        json_keys=tuple(options.json_keys),
        workers=options.workers,
        append_eod=options.append_eod,
        on_error=options.on_error,
        log_interval=options.log_interval,
        read=ReadConfig(
            format=options.format,
            utf8_errors=options.utf8_errors,
            signals=options.signals,
            max_line_bytes=int(options.max_line_mb * 1e6),
        ),
        filters=filters,
        source_field=options.source_field,
    )


def show(report: PreprocessReport, num_done_before: int = 0, num_written: int = 1) -> None:
    """Where every line went; shards that were done before count, but their time is not known."""
    for error in report.errors:
        print(f"left out: {error}", file=sys.stderr)
    if report.num_errors > len(report.errors):
        print(f"left out: {report.num_errors - len(report.errors)} more", file=sys.stderr)
    for rule, count in report.dropped.items():
        print(f"dropped by {rule}: {count:,}")
    for key, count in report.num_tokens.items():
        print(f"{key}: {count:,} tokens, {report.num_empty[key]} empty documents")
    line = (
        f"{report.num_lines:,} lines: {report.num_documents:,} documents, {report.num_errors} broken, "
        f"{report.num_blank} blank, {sum(report.dropped.values()):,} dropped"
    )
    if not num_written:
        line += "; already done"
    elif num_done_before:
        line += f"; {num_done_before} shards were already done, {report.elapsed_s:.1f} s for the others"
    elif report.elapsed_s:
        line += f"; {report.elapsed_s:.1f} s, {report.num_text_bytes / 1e6 / report.elapsed_s:.1f} MB/s"
    print(line)


def show_dry_run(result: DryRun) -> None:
    """What the filter does to a sample."""
    print(f"{result.num_lines:,} lines of {result.num_files} files")
    print(f"  kept {result.num_kept:,}, blank {result.num_blank:,}, broken {result.num_broken:,}")
    for rule, count in result.dropped.items():
        print(f"  {count:8,} dropped by {rule}")
    for rule, texts in result.examples.items():
        print(f"{rule}:")
        for text in texts:
            print(f"    {text}")
    for error in result.errors[:20]:
        print(f"broken: {error}", file=sys.stderr)


def say_what_is_replaced(config: PreprocessConfig) -> None:
    """Corpora of the same name; they stay as they are until the new ones are whole."""
    there = [config.prefix(key) for key in config.json_keys if Path(f"{config.prefix(key)}.bin").exists()]
    if there:
        print(f"replacing the corpus that is there: {', '.join(there)}", flush=True)


def run(options: argparse.Namespace) -> None:
    """What the flags ask for."""
    config = build_config(options)

    def log(line: str) -> None:
        print(line, flush=True)

    if options.dry_run is not None:
        show_dry_run(dry_run(config, options.dry_run))
    elif options.merge:
        say_what_is_replaced(config)
        show(merge_shards(config, options.output_dir))
        print(f"wrote {', '.join(config.prefix(key) for key in config.json_keys)}")
    elif options.output_dir is not None:
        part = NodePart(options.shard_index, options.num_shards)
        result = preprocess_shards(config, options.output_dir, part, options.verify, log)
        show(result.report, result.num_done_before, result.num_written)
        state = "all shards are done: manifest.json" if result.is_complete else "shards of other nodes are not done yet"
        print(f"wrote {result.num_written} of {result.num_shards} shards to {options.output_dir}; {state}")
    else:
        say_what_is_replaced(config)
        show(preprocess(config, log))
        print(f"wrote {', '.join(config.prefix(key) for key in config.json_keys)}")


def _stop(signum: int, frame: FrameType | None) -> None:
    # An exception, so that the writer removes what is half written.
    raise SystemExit(128 + signum)


def main() -> None:
    """Tokenize, and say where every line went."""
    signal.signal(signal.SIGTERM, _stop)
    options = parse_arguments()
    sys.path.append(str(Path.cwd()))  # where a user's --predicate lies
    with one_line("preprocess_data"):
        run(options)


if __name__ == "__main__":
    main()
