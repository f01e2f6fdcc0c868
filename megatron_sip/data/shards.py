"""A corpus of many files: one output shard per input file, written by one worker each, in any number of processes
and nodes, and gone on with after any interruption.

In the output folder: ``plan.json`` (inputs and options, equal for all nodes), per shard ``<shard>_<field>_document``
``.bin/.idx/.meta.json`` and, last, ``<shard>.done.json`` with counts and checksums; ``manifest.json`` when every shard
is done. A shard is done or it is not there: what a killed process leaves are ``*.partial`` files. All of it depends on
the inputs and options only, so that a run in pieces gives the same bytes as one in a single piece.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.encode import EncodedBatch, LineEncoder
from megatron_sip.data.indexed import IndexedWriter
from megatron_sip.data.preprocess import PreprocessConfig, corpus_meta
from megatron_sip.data.progress import PreprocessReport
from megatron_sip.data.readers import expand_inputs, read_file
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.files import cannot_write
from megatron_sip.tokenizer import Tokenizer

NUM_COUNTERS = 6
"""Of a shard, for the progress line: lines, documents, errors, bytes of text, tokens, bytes read."""
_LOCK_WAIT_S = 30.0
_SUFFIXES = (".bin", ".idx", ".meta.json", ".sources")


@dataclass(frozen=True)
class Shard:
    """One input file and the name of what becomes of it."""

    source: Path
    num_bytes: int
    name: str


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a corpus: the same on every node and in every run that goes on."""

    folder: Path
    shards: tuple[Shard, ...]
    options: Mapping[str, Any]
    """Everything that the output depends on besides the input files."""

    def done_path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}.done.json"

    def prefix(self, shard: Shard, key: str) -> str:
        return str(self.folder / f"{shard.name}_{key}_document")

    def as_json(self) -> dict[str, Any]:
        listed = [{"source": str(s.source), "num_bytes": s.num_bytes, "name": s.name} for s in self.shards]
        return {"options": dict(self.options), "shards": listed}


def make_plan(config: PreprocessConfig, folder: Path, tokenizer: Tokenizer) -> ShardPlan:
    """The plan of a configuration, written to ``plan.json`` or compared with the one that is there.

    Raises ``ConfigurationError`` if the folder was begun with other inputs or options.
    """
    sources = expand_inputs(config.inputs)
    digits = len(str(len(sources) - 1))
    shards = tuple(
        Shard(path, path.stat().st_size, f"{number:0{digits}d}-{_stem(path)}") for number, path in enumerate(sources)
    )
    excluded = config.filters.exclude
    options = {
        "tokenizer": tokenizer.fingerprint,
        "json_keys": list(config.json_keys),
        "append_eod": config.append_eod,
        "read": asdict(config.read),
        "filters": asdict(config.filters),
        "excluded": None if excluded is None else hashlib.sha256(Path(excluded).read_bytes()).hexdigest(),
    }
    if config.source_field is not None:
        options["source_field"] = config.source_field
    plan = ShardPlan(folder, shards, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    wanted = json.loads(json.dumps(plan.as_json()))
    path = folder / "plan.json"
    if not path.exists():
        write_json(path, wanted)
    found = read_json(path)
    if found != wanted:
        raise ConfigurationError(
            f"{path}: begun with other {_differences(found, wanted)}; repeat the command with those, or give another "
            "--output-dir"
        )
    return plan


def _stem(path: Path) -> str:
    name = re.sub(r"\.(jsonl|json|parquet)(\.gz|\.zst)?$", "", path.name)
    return re.sub(r"[^\w.-]", "_", name)[:80]


def _differences(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict) or not isinstance(found.get("options"), dict):
        return "options (damaged file)"
    names = [
        f"{name} {found['options'].get(name)!r}"
        for name in sorted(wanted["options"] | found["options"])
        if wanted["options"].get(name) != found["options"].get(name)
    ]
    if found.get("shards") != wanted["shards"]:
        names.append(f"inputs ({len(found.get('shards') or ())} files, now {len(wanted['shards'])}, or other sizes)")
    return ", ".join(names)


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    # Several nodes may write the plan or the manifest at once, the same bytes each.
    partial = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def read_json(path: Path) -> Any:
    """Raises ``DataError`` for a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); delete it and run again") from error


def is_done(plan: ShardPlan, shard: Shard, verify: bool = False) -> bool:
    """Whether a shard's files are there as its note says: their sizes, with ``verify`` their checksums too."""
    path = plan.done_path(shard)
    if not path.is_file():
        return False
    for name, noted in read_json(path)["files"].items():
        file = plan.folder / name
        if not file.is_file() or file.stat().st_size != noted["num_bytes"]:
            return False
        if verify and checksum(file) != noted["sha256"]:
            return False
    return True


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(plan: ShardPlan, shard: Shard, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
    """Hold a shard against other processes; the lock ends with its process, however that ends."""
    path = plan.folder / f"{shard.name}.lock"
    deadline = time.monotonic() + wait_s
    with open(path, "ab") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{path}: another process has been writing this shard for {wait_s:.0f} s; give every "
                        "node its own --shard-index, or end that process"
                    ) from None
                time.sleep(0.2)
        yield
        path.unlink(missing_ok=True)


def discard_partials(plan: ShardPlan, shard: Shard) -> None:
    """Remove what a killed worker left of a shard, unless another process is writing it."""
    if (plan.folder / f"{shard.name}.lock").exists():
        with suppress(DataError), _locked(plan, shard, wait_s=0):
            for partial in plan.folder.glob(f"{shard.name}[_.]*.partial"):
                partial.unlink()


def write_shard(
    config: PreprocessConfig,
    plan: ShardPlan,
    shard: Shard,
    encoder: LineEncoder,
    tokenizer: Tokenizer,
    counters: NDArray[np.int64] | None = None,
) -> None:
    """Tokenize one input file into its shard. Raises ``DataError`` with file and line."""
    with _locked(plan, shard):
        if is_done(plan, shard):  # by the process that held the lock before
            return
        plan.done_path(shard).unlink(missing_ok=True)
        for stale in plan.folder.glob(f"{plan.done_path(shard).name}.*.partial"):
            stale.unlink()
        report = PreprocessReport(num_empty=dict.fromkeys(config.json_keys, 0))
        with ExitStack() as stack:
            writers = {
                key: stack.enter_context(IndexedWriter(plan.prefix(shard, key), tokenizer.vocab_size))
                for key in config.json_keys
            }
            num_bytes_before = 0
            for batch in map(encoder, read_file(shard.source, config.reading)):
                report.count(batch, config.on_error, config.json_keys)
                for writer, column in zip(writers.values(), batch.columns, strict=True):
                    writer.add_documents(column.tokens, column.lengths, column.sources)
                if counters is not None:
                    _advance(counters, batch, batch.num_bytes_read - num_bytes_before)
                num_bytes_before = batch.num_bytes_read
            for key, writer in writers.items():
                report.num_tokens[key] = writer.num_tokens
                if writer.num_documents:
                    writer.close(corpus_meta(config, tokenizer, writer, report, report.num_empty[key]))
                else:
                    writer.discard()
        write_json(plan.done_path(shard), _note(plan, shard, report, tokenizer.engine))


def _advance(counters: NDArray[np.int64], batch: EncodedBatch, num_bytes_read: int) -> None:
    num_tokens = sum(int(column.lengths.sum()) for column in batch.columns)
    steps = (batch.num_lines, batch.num_documents, len(batch.errors), batch.num_text_bytes, num_tokens, num_bytes_read)
    counters += steps


def _note(plan: ShardPlan, shard: Shard, report: PreprocessReport, engine: str) -> dict[str, Any]:
    files = [Path(plan.prefix(shard, key) + suffix) for key in report.num_tokens for suffix in _SUFFIXES]
    counts = asdict(report)
    del counts["elapsed_s"]
    return {
        "source": str(shard.source),
        "tokenizer_engine": engine,
        "counts": counts,
        "files": {
            path.name: {"num_bytes": path.stat().st_size, "sha256": checksum(path)} for path in files if path.exists()
        },
    }


def shard_report(plan: ShardPlan, shard: Shard) -> PreprocessReport:
    """The counts of a shard that is done."""
    return PreprocessReport(**read_json(plan.done_path(shard))["counts"])


def write_manifest(plan: ShardPlan) -> PreprocessReport:
    """``manifest.json``: totals, and every shard with its counts and checksums. All shards must be done."""
    total = PreprocessReport()
    shards = {}
    for shard in plan.shards:
        shards[shard.name] = read_json(plan.done_path(shard))
        total.add(shard_report(plan, shard))
    counts = asdict(total)
    del counts["elapsed_s"]
    write_json(plan.folder / "manifest.json", {"options": dict(plan.options), "counts": counts, "shards": shards})
    return total
