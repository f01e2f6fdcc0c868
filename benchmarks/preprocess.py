#!/usr/bin/env python
"""tools/preprocess_data.py beside Megatron-LM's approach, on the same text, tokenizer and number of workers.

Megatron-LM's approach: per line ``json.loads``, a list of ids back from the worker, one builder that takes them one by
one. With the tokenizer alone as the bound. Files are compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.preprocess import PreprocessConfig, preprocess
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron_sip.tokenizer.config import TOKENIZER_TYPES

_state: dict[str, Tokenizer] = {}


def _start(config: TokenizerConfig) -> None:
    _state["tokenizer"] = build_tokenizer(config)


def _theirs(line: str) -> list[int]:
    tokenizer = _state["tokenizer"]
    return [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod_id]


def _bare(texts: list[str]) -> int:
    return sum(map(len, _state["tokenizer"].encode_batch(texts)))


def megatron_approach(path: Path, prefix: Path, config: TokenizerConfig, workers: int) -> None:
    """What Megatron-LM's tools/preprocess_data.py does."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(build_tokenizer(config).vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=dtype)
    with multiprocessing.get_context("spawn").Pool(workers, _start, (config,)) as pool, open(path) as stream:
        for ids in pool.imap(_theirs, stream, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}_text_document.idx")


def bare_tokenizer(path: Path, config: TokenizerConfig, workers: int) -> None:
    """The tokenizer's own call on texts that are in memory."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (config,)) as pool:
        list(pool.map(_bare, parts, chunksize=4))


def ours(path: Path, prefix: Path, config: TokenizerConfig, workers: int) -> None:
    """tools/preprocess_data.py."""
    preprocess(PreprocessConfig((str(path),), str(prefix), config, workers=workers, append_eod=True), lambda line: None)


def measure(name: str, num_bytes: int, action: Callable[[], None]) -> None:
    """Print the speed of an action, start of its workers included."""
    started = time.monotonic()
    action()
    took_s = time.monotonic() - started
    print(f"{name:36} {took_s:7.2f} s {num_bytes / 1e6 / took_s:7.2f} MB/s", flush=True)


def main() -> None:
    """Measure in turn, ``--repeats`` times, and compare the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a jsonl file with a text field")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="SentencePieceTokenizer")
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    config = TokenizerConfig(tokenizer_type=options.tokenizer_type, tokenizer_model=options.tokenizer_model)
    size = options.input.stat().st_size
    print(f"{size / 1e6:.1f} MB, {options.workers} workers, {options.tokenizer_type}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for _ in range(options.repeats):
            arguments = (config, options.workers)
            measure("tokenizer alone", size, partial(bare_tokenizer, options.input, *arguments))
            measure("Megatron-LM's approach", size, partial(megatron_approach, options.input, root / "b", *arguments))
            measure("tools/preprocess_data.py", size, partial(ours, options.input, root / "a", *arguments))
        for suffix in (".bin", ".idx"):
            equal = (root / f"a_text_document{suffix}").read_bytes() == (root / f"b_text_document{suffix}").read_bytes()
            print(f"{suffix}: {'equal' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
