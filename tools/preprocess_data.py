#!/usr/bin/env python
"""Tokenize jsonl documents into Megatron .bin/.idx corpora (flags and file names are Megatron-LM's)."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.preprocess import PreprocessConfig, PreprocessReport, preprocess
from megatron_sip.errors import SIPError
from megatron_sip.tokenizer.config import TOKENIZER_TYPES, TokenizerConfig


def parse_arguments() -> PreprocessConfig:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    data = parser.add_argument_group("input and output")
    data.add_argument("--input", nargs="+", required=True, help="jsonl files or globs, also .gz and .zst")
    data.add_argument("--json-keys", nargs="+", default=["text"], help="fields to tokenize, one corpus each")
    data.add_argument("--output-prefix", required=True, help="writes <prefix>_<key>_document.bin, .idx, .meta.json")
    data.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="broken lines: stop, or count them")
    data.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    data.add_argument("--log-interval", type=int, default=10_000, help="documents between progress lines")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="SentencePieceTokenizer")
    group.add_argument("--tokenizer-model", help="model file, or name or folder of a Hugging Face tokenizer")
    group.add_argument("--vocab-size", type=int, help="for NullTokenizer and TikTokenizer")
    group.add_argument("--tiktoken-pattern", choices=("v1", "v2"), default="v2")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tiktoken-special-tokens", nargs="+")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    options = parser.parse_args()
    special_tokens = options.tiktoken_special_tokens
    tokenizer = TokenizerConfig(
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_size=options.vocab_size,
        tiktoken_pattern=options.tiktoken_pattern,
        tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        tiktoken_special_tokens=tuple(special_tokens) if special_tokens else None,
    )
    return PreprocessConfig(
        inputs=tuple(options.input),
        output_prefix=options.output_prefix,
        tokenizer=tokenizer,
        json_keys=tuple(options.json_keys),
        workers=options.workers,
        append_eod=options.append_eod,
        on_error=options.on_error,
        log_interval=options.log_interval,
    )


def show(config: PreprocessConfig, report: PreprocessReport) -> None:
    """Where every line went."""
    for error in report.errors:
        print(f"left out: {error}", file=sys.stderr)
    if report.num_errors > len(report.errors):
        print(f"left out: {report.num_errors - len(report.errors)} more", file=sys.stderr)
    for key in config.json_keys:
        print(f"wrote {config.prefix(key)}: {report.num_tokens[key]:,} tokens, {report.num_empty[key]} empty documents")
    print(
        f"{report.num_lines:,} lines: {report.num_documents:,} documents, {report.num_errors} broken, "
        f"{report.num_blank} blank; {report.elapsed_s:.1f} s, "
        f"{report.num_text_bytes / 1e6 / max(report.elapsed_s, 1e-9):.1f} MB/s"
    )


def _stop(signum: int, frame: FrameType | None) -> None:
    # An exception, so that the writer removes what is half written.
    raise SystemExit(128 + signum)


def main() -> None:
    """Tokenize, and say where every line went."""
    signal.signal(signal.SIGTERM, _stop)
    config = parse_arguments()
    try:
        show(config, preprocess(config, lambda line: print(line, flush=True)))
    except SIPError as error:
        sys.exit(f"preprocess_data: {error}")


if __name__ == "__main__":
    main()
