"""Documents to one tokenized corpus: parallel, in input order, and without a silent loss.

One process reads lines and writes results; workers parse, filter and tokenize a batch of lines at a time and return
the bytes of their tokens. The result does not depend on the number of workers. For input of many files see
``shards.py``, where every worker has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_sip.data.encode import EncodedBatch, LineEncoder
from megatron_sip.data.filters import FilterConfig
from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.data.jsonl import LineBatch
from megatron_sip.data.progress import PreprocessReport, Progress
from megatron_sip.data.readers import ReadConfig, expand_inputs, read_batches
from megatron_sip.data.workers import WorkerLost, WorkerPool
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read, how to tokenize it, where to write it."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    workers: int = 1
    append_eod: bool = False
    on_error: str = "fail"
    log_interval: int = 10_000
    read: ReadConfig = field(default_factory=ReadConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    source_field: str | None = None
    """Field (dotted path) with a document's source, such as ``meta.redpajama_set_name``: kept for the data card."""

    def validate(self) -> None:
        """Raise ``ConfigurationError`` for options that cannot work."""
        self.tokenizer.validate()
        self.read.validate()
        self.filters.validate()
        if self.filters.drop_duplicates and self.read.format != "redpajama-v2":
            raise ConfigurationError("--drop-duplicates reads RedPajama-V2's duplicates: give --format redpajama-v2")
        if self.on_error not in ("skip", "fail"):
            raise ConfigurationError(f"--on-error {self.on_error}: choose skip or fail")
        for name in ("workers", "log_interval"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigurationError(f"--json-keys {' '.join(self.json_keys)}: name each field once")

    def prefix(self, key: str) -> str:
        """Path of a field's corpus, named as Megatron-LM's tool names it."""
        return f"{self.output_prefix}_{key}_document"

    def encoder(self, tokenizer: Tokenizer) -> LineEncoder:
        """What turns this configuration's lines into tokens."""
        return LineEncoder(tokenizer, self.json_keys, self.append_eod, self.reading, self.filters, self.source_field)

    @property
    def reading(self) -> ReadConfig:
        """``read`` with the columns that the fields and the filter need."""
        fields = self.filters.fields
        if fields is None:
            return replace(self.read, columns=())
        source = () if self.source_field is None else (self.source_field,)
        return replace(self.read, columns=(*self.json_keys, *fields, *source))


def engine_line(tokenizer: Tokenizer) -> str:
    """What tokenizes, for the log."""
    reason = f" (not by gigatoken: {tokenizer.engine_reason})" if tokenizer.engine_reason else ""
    return f"tokenizing by {tokenizer.engine or type(tokenizer).__name__}{reason}"


def start_encoder(config: PreprocessConfig) -> LineEncoder:
    """What a worker answers batches of lines with."""
    return config.encoder(build_tokenizer(config.tokenizer))


def _encoded_batches(config: PreprocessConfig, tokenizer: Tokenizer, paths: Sequence[Path]) -> Iterator[EncodedBatch]:
    """Results in input order, with a bounded number of batches in flight."""
    batches = read_batches(paths, config.reading)
    if config.workers == 1:
        yield from map(config.encoder(tokenizer), batches)
        return
    try:
        pool: WorkerPool[LineBatch, EncodedBatch]
        with WorkerPool(config.workers, start_encoder, config) as pool:
            yield from pool.map(batches)
    except WorkerLost as lost:
        raise DataError(
            f"{lost}; nothing was written: run again, with fewer than --workers {config.workers} if memory is short"
        ) from None


def preprocess(config: PreprocessConfig, log: Callable[[str], None] = print) -> PreprocessReport:
    """Write one corpus per field, ``<output_prefix>_<field>_document.bin`` and so on: whole ones, or none.

    Raises ``ConfigurationError``; ``DataError`` for a broken line under ``--on-error fail``, for input without any
    document, and for a full disk.
    """
    config.validate()
    paths = expand_inputs(config.inputs)
    tokenizer = build_tokenizer(config.tokenizer)
    config.encoder(tokenizer)  # says here what is wrong with the filter, and not in every worker
    log(engine_line(tokenizer))
    report = PreprocessReport(num_empty=dict.fromkeys(config.json_keys, 0))
    progress = Progress(sum(path.stat().st_size for path in paths), config.log_interval, log)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(config.prefix(key), tokenizer.vocab_size)) for key in config.json_keys
        ]
        for batch in _encoded_batches(config, tokenizer, paths):
            report.count(batch, config.on_error, config.json_keys)
            for writer, column in zip(writers, batch.columns, strict=True):
                writer.add_documents(column.tokens, column.lengths, column.sources)
            progress.show(report, sum(writer.num_tokens for writer in writers), batch.num_bytes_read)
        for key, writer in zip(config.json_keys, writers, strict=True):
            if not writer.num_documents:
                raise DataError(nothing_found(" ".join(config.inputs), key, report))
        for key, writer in zip(config.json_keys, writers, strict=True):
            report.num_tokens[key] = writer.num_tokens
            writer.close(corpus_meta(config, tokenizer, writer, report, report.num_empty[key]))
    report.elapsed_s = progress.elapsed_s
    return report


def nothing_found(inputs: str, key: str, report: PreprocessReport) -> str:
    """What to say of input without any document."""
    return (
        f"{inputs}: no document with text in {key!r} among {report.num_lines} lines "
        f"({report.num_blank} blank, {report.num_errors} broken, {report.num_empty.get(key, 0)} empty, "
        f"{sum(report.dropped.values())} dropped by the filter); no corpus was written"
        + "".join(f"\n  {error}" for error in report.errors)
        + "".join(f"\n  {rule}: dropped {count}" for rule, count in report.dropped.items())
    )


def corpus_meta(
    config: PreprocessConfig, tokenizer: Tokenizer, writer: IndexedWriter, report: PreprocessReport, num_empty: int
) -> CorpusMeta:
    """The sidecar of a corpus."""
    return CorpusMeta(
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_type=config.tokenizer.tokenizer_type,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        append_eod=config.append_eod,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_text_bytes=report.num_text_bytes,
        num_skipped=report.num_errors,
        num_empty=num_empty,
        tokenizer_engine=tokenizer.engine,
    )
