"""What benchmarks/preprocess.py times: each contender is a program of its own, ``preprocess_contenders.py NAME``.

``bare``: the tokenizer's own call on texts in memory, and nothing else; prints its seconds. ``approach``: Megatron-LM's
way, re-implemented: per line ``json.loads``, a list of ids back from the worker, one builder that takes them one by
one.
``datatrove``: its local executor. ``work``: see ``benchmarks/preprocess.py``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.encode import EncodedBatch, LineEncoder
from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.data.jsonl import read_lines
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron_sip.tokenizer.base import TokenArray

_state: dict[str, Any] = {}


def texts_of(path: Path) -> list[str]:
    """All texts of a jsonl file."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def _start_bare(config: TokenizerConfig, path: Path, workers: int, barrier: Any) -> None:
    _state["tokenizer"] = build_tokenizer(config)
    _state["texts"] = texts_of(path)
    _state["barrier"] = barrier


def _bare(share: tuple[int, int, int]) -> tuple[float, float]:
    index, count, passes = share
    texts = _state["texts"][index::count]
    parts = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    _state["barrier"].wait()
    started, cpu = time.monotonic(), time.process_time()
    for _ in range(passes):
        for part in parts:
            _state["tokenizer"].encode_packed(part)
    return time.monotonic() - started, time.process_time() - cpu


def bare(path: Path, config: TokenizerConfig, workers: int, passes: int) -> None:
    """Every worker tokenizes its share ``passes`` times; all begin at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with context.Pool(workers, _start_bare, (config, path, workers, barrier)) as pool:
        found = pool.map(_bare, [(i, workers, passes) for i in range(workers)], chunksize=1)
    print(json.dumps({"wall_s": max(wall for wall, _ in found), "cpu_s": sum(cpu for _, cpu in found)}))


def _start(config: TokenizerConfig) -> None:
    _state["tokenizer"] = build_tokenizer(config)


def _theirs(line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
    tokenizer = _state["tokenizer"]
    ids = tokenizer.encode(json.loads(line)["text"])
    if ids:
        ids.append(tokenizer.eod_id)
    return {"text": ids}, {"text": [len(ids)]}, len(line)


def approach(path: Path, prefix: str, config: TokenizerConfig, workers: int) -> None:
    """What Megatron-LM's tools/preprocess_data.py does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(build_tokenizer(config).vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=dtype)
    with multiprocessing.get_context("spawn").Pool(workers, _start, (config,)) as pool, open(path) as stream:
        for ids, lengths, _ in pool.imap(_theirs, stream, 32):
            builder.add_document(ids["text"], lengths["text"])
    builder.finalize(f"{prefix}_text_document.idx")


def datatrove(folder: Path, output: Path, config: TokenizerConfig, workers: int) -> None:
    """Its JsonlReader and DocumentTokenizer, a task per worker, without shuffling and merging."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    definition = str(Path(config.tokenizer_model or "") / "tokenizer.json")
    tokens = DocumentTokenizer(
        str(output), tokenizer_name_or_path=definition, eos_token="</s>", shuffle_documents=False
    )
    steps = [JsonlReader(str(folder), glob_pattern="*.jsonl"), tokens]
    LocalPipelineExecutor(steps, tasks=workers, workers=workers, logging_dir=str(output / "log")).run()


class Replay(Tokenizer):
    """Knows the ids of every text beforehand: a tokenizer whose own call costs a look-up."""

    def __init__(self, library: Tokenizer, texts: Sequence[str]) -> None:
        self.vocab_size, self.eod_id, self.fingerprint = library.vocab_size, library.eod_id, library.fingerprint
        tokens, lengths = library.encode_packed(texts)
        self._rows = dict(zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True))
        self._lists = {text: row.tolist() for text, row in self._rows.items()}

    def encode(self, text: str) -> list[int]:
        return self._lists[text].copy()

    def encode_packed(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        rows = [self._rows[text] for text in texts]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        raise TypeError("ids are replayed, text is not")


def their_work(path: Path, prefix: str) -> None:
    """Everything that the approach does, in one process, with the pickles that its pool sends."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(_state["tokenizer"].vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=dtype)
    with open(path) as stream:
        for lines in _chunks(stream, 32):
            sent = pickle.loads(pickle.dumps(lines))
            for ids, lengths, _ in pickle.loads(pickle.dumps([_theirs(line) for line in sent])):
                builder.add_document(ids["text"], lengths["text"])
    builder.finalize(f"{prefix}_text_document.idx")


def _chunks(stream: Iterator[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in stream:
        chunk.append(line)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def our_work(path: Path, prefix: str) -> None:
    """Everything that tools/preprocess_data.py --output-prefix does, in one process, with its pickles."""
    tokenizer: Tokenizer = _state["tokenizer"]
    encoder = LineEncoder(tokenizer, ("text",), True)
    with IndexedWriter(f"{prefix}_text_document", tokenizer.vocab_size) as writer:
        for batch in read_lines(path):
            sent = pickle.loads(pickle.dumps(batch))
            back: EncodedBatch = pickle.loads(pickle.dumps(encoder(sent)))
            writer.add_documents(back.columns[0].tokens, back.columns[0].lengths)
        counts = writer.num_documents, writer.num_tokens
        writer.close(CorpusMeta(tokenizer.fingerprint, "replay", tokenizer.vocab_size, tokenizer.eod_id, True, *counts))


def work(path: Path, config: TokenizerConfig, repeats: int) -> None:
    """CPU seconds of both besides the tokenizer's own call, in turn; their files are compared."""
    _state["tokenizer"] = Replay(build_tokenizer(config), texts_of(path))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats + 1):
            found = {}
            for name, action in (("theirs", their_work), ("ours", our_work)):
                started = time.process_time()
                action(path, f"{folder}/{name}")
                found[name] = time.process_time() - started
            print(json.dumps(found), flush=True)
        for suffix in (".bin", ".idx"):
            first, second = (Path(f"{folder}/{name}_text_document{suffix}").read_bytes() for name in ("theirs", "ours"))
            if first != second:
                sys.exit(f"{suffix} differs")


def main() -> None:
    """Run one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("bare", "approach", "datatrove", "work"))
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--tokenizer", required=True, help="TokenizerConfig as JSON")
    options = parser.parse_args()
    config = TokenizerConfig(**json.loads(options.tokenizer))
    if options.name == "bare":
        bare(options.input, config, options.workers, options.passes)
    elif options.name == "approach":
        approach(options.input, options.output, config, options.workers)
    elif options.name == "datatrove":
        datatrove(options.input, Path(options.output), config, options.workers)
    else:
        work(options.input, config, options.passes)


if __name__ == "__main__":
    main()
