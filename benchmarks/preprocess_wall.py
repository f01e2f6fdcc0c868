#!/usr/bin/env python
"""tools/preprocess_data.py beside Megatron-LM's approach, Megatron-LM's own code and datatrove, in wall time.

Every contender has --workers processes that tokenize, started and warm before its time begins. ``ours, shards``: a
shard per input file, as with --output-dir; ``alone``: the workers call the tokenizer on texts that they hold, and write
nothing; datatrove: a task of its own, with its executor in the process, on each worker's part of the files.
The same text in 4 files per worker; contenders in turn, in --repeats rounds after one that is not counted; what is
written must be the same bytes. Needs an idle machine: CPU time is in ``benchmarks/preprocess.py``.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import multiprocessing.pool
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.preprocess import LINES_PER_TASK, Replay, approach_encode, megatron_encode, parse_tokenizer, texts_of
from megatron_sip.data.encode import EncodedBatch, LineEncoder
from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.data.jsonl import LineBatch, read_lines
from megatron_sip.data.workers import WorkerPool
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

_FILES_PER_WORKER = 4
_TEXTS_PER_CALL = 256
_state: dict[str, Any] = {}
"""``encode`` of a process of the approach's pool, as Megatron-LM's ``Encoder`` keeps its tokenizer."""


@dataclass(frozen=True)
class Setting:
    """What every contender is given."""

    config: TokenizerConfig
    files: tuple[Path, ...]
    workers: int
    is_replayed: bool
    megatron_lm: Path | None = None


def tokenizer_of(setting: Setting, engine: str = "library") -> Tokenizer:
    """The tokenizer, or one that knows the ids of the files beforehand."""
    library = build_tokenizer(replace(setting.config, tokenizer_engine=engine))
    if not setting.is_replayed:
        return library
    return Replay(library, list(chain.from_iterable(map(texts_of, setting.files))))


def start_worker(setting: Setting, engine: str) -> Callable[[Any], Any]:
    """In a worker of ours: takes a batch of lines, a file and a prefix, or (tokenizer alone) a file."""
    tokenizer = tokenizer_of(setting, engine)
    encoder = LineEncoder(tokenizer, ("text",), True)
    held = {path: texts_of(path) for path in setting.files}

    def act(task: LineBatch | tuple[Path, str] | Path) -> EncodedBatch | None:
        if isinstance(task, LineBatch):
            return encoder(task)
        if isinstance(task, tuple):
            path, prefix = task
            with IndexedWriter(f"{prefix}_text_document", tokenizer.vocab_size) as writer:
                _write(writer, map(encoder, read_lines(path)), tokenizer)
            return None
        for start in range(0, len(held[task]), _TEXTS_PER_CALL):
            tokenizer.encode_packed(held[task][start : start + _TEXTS_PER_CALL])
        return None

    return act


def _write(writer: IndexedWriter, batches: Iterator[EncodedBatch], tokenizer: Tokenizer) -> None:
    for batch in batches:
        writer.add_documents(batch.columns[0].tokens, batch.columns[0].lengths)
    counts = writer.num_documents, writer.num_tokens
    writer.close(CorpusMeta(tokenizer.fingerprint, "", tokenizer.vocab_size, tokenizer.eod_id, True, *counts))


def start_approach(setting: Setting, folder: str) -> None:
    """In a process of Megatron-LM's pool, or of the approach's."""
    if setting.megatron_lm is not None:
        _state["encode"] = megatron_encode(setting.megatron_lm, setting.config, folder)
    else:
        _state["encode"] = partial(approach_encode, tokenizer_of(setting))


def _encode(line: str) -> Any:
    return _state["encode"](line)


def run_alone(pool: WorkerPool[Path, None], setting: Setting, prefix: str) -> None:
    """The tokenizer's own call."""
    for _ in pool.map(setting.files):
        pass


def run_shards(pool: WorkerPool[tuple[Path, str], None], setting: Setting, prefix: str) -> None:
    """What the tool does with --output-dir."""
    for _ in pool.map((path, f"{prefix}{number:03d}") for number, path in enumerate(setting.files)):
        pass


def run_ours(
    pool: WorkerPool[LineBatch, EncodedBatch] | LineEncoder, tokenizer: Tokenizer, setting: Setting, prefix: str
) -> None:
    """What the tool does with --output-prefix; with one worker all in one process."""
    batches = chain.from_iterable(map(read_lines, setting.files))
    with IndexedWriter(f"{prefix}_text_document", tokenizer.vocab_size) as writer:
        encoded = map(pool, batches) if isinstance(pool, LineEncoder) else pool.map(batches)
        _write(writer, encoded, tokenizer)


def run_approach(pool: multiprocessing.pool.Pool, vocab_size: int, setting: Setting, prefix: str) -> None:
    """What Megatron-LM's ``Partition.process_json_file`` does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=dtype)
    for ids, lengths, _ in pool.imap(_encode, _lines(setting.files), LINES_PER_TASK):
        builder.add_document(ids["text"], lengths["text"])
    builder.finalize(f"{prefix}_text_document.idx")


def _lines(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8") as stream:
            yield from stream


def start_datatrove(setting: Setting, folder: str) -> Callable[[Path], None]:
    """In a worker: its JsonlReader and DocumentTokenizer on a folder, without shuffling."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    definition = str(Path(setting.config.tokenizer_model or "") / "tokenizer.json")

    def tokenize(path: Path) -> None:
        output = tempfile.mkdtemp(dir=folder)
        tokens = DocumentTokenizer(output, tokenizer_name_or_path=definition, eos_token="</s>", shuffle_documents=False)
        LocalPipelineExecutor([JsonlReader(str(path)), tokens], tasks=1, workers=1, logging_dir=f"{output}/log").run()

    return tokenize


def run_datatrove(pool: WorkerPool[Path, None], setting: Setting, prefix: str) -> None:
    """Another format than Megatron's: not compared."""
    for _ in pool.map(dict.fromkeys(path.parent for path in setting.files)):
        pass


def contenders(options: argparse.Namespace, setting: Setting, folder: str, stack: ExitStack) -> dict[str, Any]:
    """Name -> action that is given the prefix to write to. Their workers are started."""
    found: dict[str, Any] = {}
    for engine in ("library", "gigatoken") if options.fast else ("library",):
        label = "" if engine == "library" else ", gigatoken"
        tokenizer = tokenizer_of(setting, engine)
        pool: WorkerPool[Any, Any] = WorkerPool(setting.workers, start_worker, setting, engine)
        stack.enter_context(pool)
        encoder = LineEncoder(tokenizer, ("text",), True)
        found[f"tokenizer alone{label}"] = partial(run_alone, pool, setting)
        found[f"ours{label}"] = partial(run_ours, encoder if setting.workers == 1 else pool, tokenizer, setting)
        found[f"ours, shards{label}"] = partial(run_shards, pool, setting)
    for name, checkout in (("approach", None), ("Megatron-LM", options.megatron_lm)):
        if name == "approach" or checkout is not None:
            given = replace(setting, megatron_lm=checkout)
            theirs = multiprocessing.get_context("spawn").Pool(setting.workers, start_approach, (given, folder))
            found[name] = partial(run_approach, stack.enter_context(theirs), tokenizer.vocab_size, setting)
    if options.datatrove:
        workers: Any = WorkerPool(setting.workers, start_datatrove, setting, folder)
        found["datatrove"] = partial(run_datatrove, stack.enter_context(workers), setting)
    return found


def cut(source: Path, megabytes: float, folder: Path, workers: int) -> tuple[tuple[Path, ...], float]:
    """The beginning of a jsonl file in files of equal size, a folder of them per worker, and how many MB that is."""
    content = source.read_bytes()[: int(megabytes * 1e6)]
    lines = content[: content.rindex(b"\n") + 1].splitlines(keepends=True)
    size, done, count = sum(map(len, lines)), 0, _FILES_PER_WORKER * workers
    parts: list[list[bytes]] = [[] for _ in range(count)]
    for line in lines:
        parts[min(done * count // size, count - 1)].append(line)
        done += len(line)
    paths = tuple(folder / f"{number // _FILES_PER_WORKER:02d}" / f"part-{number:03d}.jsonl" for number in range(count))
    for path, part in zip(paths, parts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(part))
    return paths, size / 1e6


def measure(actions: dict[str, Any], folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round. Ends the program if they write different tokens."""
    seconds: dict[str, list[float]] = {contender: [] for contender in actions}
    for number in range(repeats + 1):
        written = set()
        for contender, action in actions.items():
            started = time.perf_counter()
            action(str(folder / "out"))
            if number:
                seconds[contender].append(time.perf_counter() - started)
            files = sorted(folder.glob("out*_text_document.bin"))
            if files:
                written.add(b"".join(file.read_bytes() for file in files))
            for file in folder.glob("out*"):
                file.unlink()
        if len(written) != 1:
            sys.exit("contenders write different tokens")
    return seconds


def main() -> None:
    """Measure in turn, compare tokens, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a jsonl file with a text field")
    parser.add_argument("--tokenizer", required=True, help='as JSON: {"tokenizer_type": ..., "tokenizer_model": ...}')
    parser.add_argument("--megabytes", type=float, default=1000.0, help="of the input at most")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--replay", action="store_true", help="everything but the tokenizer's own call")
    parser.add_argument("--fast", action="store_true", help="with --tokenizer-engine gigatoken too")
    parser.add_argument("--datatrove", action="store_true", help="if installed; Hugging Face tokenizers")
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM that runs in this environment")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        files, mb = cut(options.input, options.megabytes, folder / "in", options.workers)
        setting = Setting(parse_tokenizer(options.tokenizer), files, options.workers, options.replay)
        seconds = measure(contenders(options, setting, name, stack), folder, options.repeats)
    report(seconds, mb, options.workers)


def report(seconds: dict[str, list[float]], mb: float, workers: int) -> None:
    """Medians, and ratios within rounds."""
    print(f"{mb:.1f} MB, {workers} workers, {len(seconds['approach'])} rounds, wall time; tokens equal")
    print("| | s | MB/s | times the approach (least to most) | of the tokenizer alone |\n|---|---|---|---|---|")
    for name, found in seconds.items():
        ratios = [theirs / own for theirs, own in zip(seconds["approach"], found, strict=True)]
        alone = seconds["tokenizer alone, gigatoken" if "gigatoken" in name else "tokenizer alone"]
        shares = [bare / own for bare, own in zip(alone, found, strict=True)]
        median = statistics.median(found)
        print(
            f"| {name} | {median:.2f} | {mb / median:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {100 * statistics.median(shares):.0f} % |"
        )


if __name__ == "__main__":
    main()
