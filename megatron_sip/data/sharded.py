"""Runs over the shards of a corpus: this node's part by a pool of workers, and merging what all nodes wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from ctypes import Array, c_longlong
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.indexed import CorpusMeta, IndexedWriter, open_indexed, read_meta
from megatron_sip.data.preprocess import PreprocessConfig, engine_line, nothing_found
from megatron_sip.data.progress import PreprocessReport, Progress
from megatron_sip.data.shards import (
    NUM_COUNTERS,
    Shard,
    ShardPlan,
    discard_partials,
    is_done,
    make_plan,
    shard_report,
    write_manifest,
    write_shard,
)
from megatron_sip.data.sources import Sources, read_sources
from megatron_sip.data.workers import WorkerLost, WorkerPool
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import Tokenizer, build_tokenizer

_POLL_S = 0.5
_MERGE_DOCUMENTS = 65_536
_MERGE_BYTES = 64 << 20
_MAX_SHOWN_FAILURES = 10


@dataclass(frozen=True)
class NodePart:
    """Which shards are this node's: those whose number leaves ``index`` when divided by ``count``."""

    index: int = 0
    count: int = 1

    def validate(self) -> None:
        """Raise ``ConfigurationError`` for numbers that name no part."""
        if not 0 <= self.index < self.count:
            raise ConfigurationError(f"--shard-index {self.index}: must be 0 to --num-shards {self.count} - 1")

    def of(self, shards: Sequence[Shard]) -> list[Shard]:
        """This node's shards, the largest first, so that the last ones to finish are small."""
        return sorted(shards[self.index :: self.count], key=lambda shard: -shard.num_bytes)


@dataclass(frozen=True)
class ShardedResult:
    """What a run over shards did."""

    num_shards: int
    num_done_before: int
    num_written: int
    is_complete: bool
    """Whether all shards of the corpus are done, those of other nodes too, so that the manifest is there."""
    report: PreprocessReport
    """Counts of this node's shards, also of those that were done before."""


def _start_worker(
    config: PreprocessConfig, plan: ShardPlan, memory: Array[c_longlong]
) -> Callable[[tuple[int, Shard]], None]:
    tokenizer = build_tokenizer(config.tokenizer)
    encoder, counters = config.encoder(tokenizer), _counters(memory)

    def write(task: tuple[int, Shard]) -> None:
        number, shard = task
        write_shard(config, plan, shard, encoder, tokenizer, counters[number])

    return write


def _counters(memory: Array[c_longlong]) -> NDArray[np.int64]:
    """A row per shard, [shards, NUM_COUNTERS], which only the shard's worker writes: a killed one leaves no lock."""
    return np.frombuffer(memoryview(memory), np.int64).reshape(-1, NUM_COUNTERS)


def preprocess_shards(
    config: PreprocessConfig,
    folder: Path,
    part: NodePart | None = None,
    verify: bool = False,
    log: Callable[[str], None] = print,
) -> ShardedResult:
    """Write this node's shards that are not done yet. A file that fails does not stop the others.

    ``verify`` compares checksums of finished shards, not only sizes. Raises ``ConfigurationError``, and, when all
    others are done, ``DataError`` naming the files that failed; repeating the command does these only.
    """
    config.validate()
    part = part or NodePart()
    part.validate()
    tokenizer = build_tokenizer(config.tokenizer)
    config.encoder(tokenizer)  # says here what is wrong with the filter, and not in every worker
    plan = make_plan(config, folder, tokenizer)
    mine = part.of(plan.shards)
    to_do = [shard for shard in mine if not is_done(plan, shard, verify)]
    if verify:
        for shard in to_do:  # the worker compares sizes only
            plan.done_path(shard).unlink(missing_ok=True)
    log(engine_line(tokenizer))
    log(f"{len(mine)} of {len(plan.shards)} shards are this node's, {len(mine) - len(to_do)} of them done before")
    progress = Progress(sum(shard.num_bytes for shard in to_do), config.log_interval, log)
    run = _run_here if config.workers == 1 else _run
    failures = run(config, plan, to_do, progress) if to_do else []
    if failures:
        more = f"\n  and {len(failures) - _MAX_SHOWN_FAILURES} more" if len(failures) > _MAX_SHOWN_FAILURES else ""
        raise DataError(
            f"{len(failures)} of {len(to_do)} shards failed, the others are done; mend these and repeat the command:"
            + "".join(f"\n  {failure}" for failure in failures[:_MAX_SHOWN_FAILURES])
            + more
        )
    report = PreprocessReport()
    for shard in mine:
        report.add(shard_report(plan, shard))
    report.elapsed_s = progress.elapsed_s
    is_complete = all(is_done(plan, shard) for shard in plan.shards)
    if is_complete:
        write_manifest(plan)
    return ShardedResult(len(mine), len(mine) - len(to_do), len(to_do), is_complete, report)


def _run_here(config: PreprocessConfig, plan: ShardPlan, shards: Sequence[Shard], progress: Progress) -> list[str]:
    """``_run`` in this process."""
    counters = np.zeros((len(shards), NUM_COUNTERS), np.int64)
    tokenizer = build_tokenizer(config.tokenizer)
    encoder = config.encoder(tokenizer)
    failures: dict[str, str] = {}
    for number, shard in enumerate(shards):
        try:
            write_shard(config, plan, shard, encoder, tokenizer, counters[number])
        except DataError as error:
            failures[shard.name] = str(error)
        _show(progress, counters, f"{number + 1}/{len(shards)} shards, ")
    return [failures[name] for name in sorted(failures)]


def _run(config: PreprocessConfig, plan: ShardPlan, shards: Sequence[Shard], progress: Progress) -> list[str]:
    """Write shards in parallel; return why some failed, in the order of the plan."""
    memory = get_context("spawn").RawArray(c_longlong, len(shards) * NUM_COUNTERS)
    counters = _counters(memory)
    workers = min(config.workers, len(shards))
    failures: dict[str, str] = {}
    try:
        pool: WorkerPool[tuple[int, Shard], None]
        with WorkerPool(workers, _start_worker, config, plan, memory) as pool:
            waiting = {pool.submit((number, shard)): shard for number, shard in enumerate(shards)}
            while waiting:
                finished, _ = wait(waiting, _POLL_S, FIRST_COMPLETED)
                for future in finished:
                    shard = waiting.pop(future)
                    try:
                        future.result()
                    except DataError as error:
                        failures[shard.name] = str(error)
                _show(progress, counters, f"{len(shards) - len(waiting)}/{len(shards)} shards, ")
    except BaseException as error:
        for shard in shards:  # workers were killed
            discard_partials(plan, shard)
        if isinstance(error, WorkerLost):
            raise DataError(
                f"{error}; finished shards are kept: repeat the command, with fewer than --workers {config.workers} "
                "if memory is short"
            ) from None
        raise
    return [failures[name] for name in sorted(failures)]


def _show(progress: Progress, counters: NDArray[np.int64], what: str) -> None:
    lines, documents, errors, text_bytes, tokens, bytes_read = counters.sum(axis=0).tolist()
    report = PreprocessReport(num_lines=lines, num_documents=documents, num_errors=errors, num_text_bytes=text_bytes)
    progress.show(report, tokens, bytes_read, what)


def merge_shards(config: PreprocessConfig, folder: Path) -> PreprocessReport:
    """One corpus per field, ``<output_prefix>_<field>_document``, of all shards in the order of the inputs.

    The same files as ``preprocess`` writes of the same inputs. Raises ``DataError`` if shards are missing.
    """
    config.validate()
    tokenizer = build_tokenizer(config.tokenizer)
    plan = make_plan(config, folder, tokenizer)
    missing = [shard.name for shard in plan.shards if not is_done(plan, shard)]
    if missing:
        raise DataError(f"{folder}: {len(missing)} shards are not done ({missing[0]}, ...): run all nodes first")
    total = write_manifest(plan)
    for key in config.json_keys:
        prefixes = [plan.prefix(shard, key) for shard in plan.shards]
        present = [prefix for prefix in prefixes if Path(f"{prefix}.idx").is_file()]
        if not present:
            raise DataError(nothing_found(str(folder), key, total))
        _merge(present, config.prefix(key), tokenizer, total, key)
    return total


def _merge(prefixes: Sequence[str], output: str, tokenizer: Tokenizer, total: PreprocessReport, key: str) -> None:
    with IndexedWriter(output, tokenizer.vocab_size) as writer:
        for prefix in prefixes:
            _append(writer, prefix, tokenizer)
        metas = [meta for meta in map(read_meta, prefixes) if meta is not None]
        merged: CorpusMeta = replace(
            metas[0],
            tokenizer_engine=", ".join(sorted({meta.tokenizer_engine for meta in metas})),
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
            num_text_bytes=total.num_text_bytes,
            num_skipped=total.num_errors,
            num_empty=total.num_empty[key],
        )
        writer.close(merged)


def _append(writer: IndexedWriter, prefix: str, tokenizer: Tokenizer) -> None:
    lengths = open_indexed(prefix, tokenizer.vocab_size, tokenizer.fingerprint).document_lengths.astype(np.int32)
    sources = read_sources(prefix, len(lengths))
    with open(f"{prefix}.bin", "rb") as stream:
        start = 0
        while start < len(lengths):
            sizes = np.cumsum(lengths[start : start + _MERGE_DOCUMENTS], dtype=np.int64) * writer.dtype.itemsize
            count = max(1, int(np.searchsorted(sizes, _MERGE_BYTES, side="right")))
            part = None if sources is None else Sources(sources.names, sources.codes[start : start + count])
            writer.add_documents(stream.read(int(sizes[count - 1])), lengths[start : start + count], part)
            start += count
