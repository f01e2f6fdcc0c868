#!/usr/bin/env python
"""Train a SentencePiece BPE tokenizer (byte fallback, lossless) on jsonl text."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.errors import SIPError
from megatron_sip.tokenizer.training import train_sentencepiece
from tools._help import HelpFormatter, Parser


def main() -> None:
    """Train, write the model in one move, say how large it is."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="jsonl files")
    parser.add_argument("--json-key", default="text", help="field of the text")
    parser.add_argument("--output", type=Path, required=True, help=".model file to write")
    parser.add_argument("--vocab-size", type=int, default=32000, help="number of ids, byte pieces included")
    parser.add_argument("--max-megabytes", type=float, default=10.0, help="sample every k-th document above this")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        size = train_sentencepiece(
            options.input,
            options.output,
            options.vocab_size,
            json_key=options.json_key,
            max_bytes=int(options.max_megabytes * 1e6),
            num_threads=options.workers,
        )
    except (SIPError, OSError) as error:
        sys.exit(f"train_tokenizer: {error}")
    print(f"wrote {options.output}: {size} ids, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
