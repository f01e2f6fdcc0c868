"""Rewrites the chunks of a JSONL corpus ahead of training; can be stopped at any time and shared out over machines.

tools/rewrite_corpus.py --input corpus.jsonl --output rewrites.0-of-4.jsonl --shard 0 --num-shards 4 \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model \\
    --rewriter http --judge-endpoints http://HOST:8000/v1 --judge-served-model NAME

Each document is cut into chunks of --rewrite-suffix-length tokens; each chunk but the first is rewritten, with what
stands before it as prefix. One JSON line per chunk: line, chunk, prefix, suffix, rewrite, status (rewritten, copied, or
why there is none). Chunks that failed for the network's or the server's sake, or for a wrong key or model name, are
not written: the same command again asks for those. It ends early if nothing at all is answered.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import option
from megatron_sip.config.loader import load
from megatron_sip.data.readers import expand_inputs, read_batches
from megatron_sip.errors import ConfigurationError, DataError, SIPError
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http.failures import REJECTED, SERVER, TRANSPORT, kind_of
from megatron_sip.teacher.http.waiting import await_servers
from megatron_sip.teacher.interfaces import Passage, RewriteItem, RewriteRequest
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from tools._exit import warn

_ASK_AGAIN = (TRANSPORT, SERVER, REJECTED)
"""Of the servers and of how they are asked: a wrong key or model name is mended, and the chunk is asked again."""


@dataclass(frozen=True)
class RewriteOptions:
    """What to rewrite, and where to."""

    tokenizer: TokenizerConfig
    teacher: TeacherConfig
    input: tuple[str, ...] = option(help="JSONL files or globs, plain, .gz or .zst")
    output: str = option(help="JSONL file of this shard; lines that are there already are kept")
    json_key: str = option("text", help="key of a document's text")
    shard: int = option(0, help="this job's share: documents whose line number modulo num-shards is this")
    num_shards: int = option(1, help="jobs that share the corpus")
    rewrite_suffix_length: int = option(128, help="tokens of a chunk")
    rewrite_prefix_length: int = option(1920, help="tokens of a prefix at most")
    chunks_at_a_time: int = option(1024, help="chunks that are asked for before the next are written")

    def validate(self) -> None:
        """Raises ConfigurationError."""
        if not 0 <= self.shard < self.num_shards:
            raise ConfigurationError(f"shard is {self.shard}, num-shards {self.num_shards}: count shards from 0")
        for name in ("rewrite_suffix_length", "rewrite_prefix_length", "chunks_at_a_time"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")


@dataclass(frozen=True)
class Chunk:
    line: int
    number: int
    item: RewriteItem


def main() -> None:
    """Rewrite what is left to do, and say what came of it."""
    try:
        options = load(RewriteOptions, sys.argv[1:], prog="rewrite_corpus.py")
        roles = options.teacher.http_roles(judging=False)
        await_servers(options.teacher, roles, os.environ.get(options.teacher.judge_api_key_env, ""), warn)
        counts = asyncio.run(rewrite(options))
    except (SIPError, OSError) as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{count:,} {status}" for status, count in sorted(counts.items())) or "nothing left to do")
    if any(counts[kind] for kind in _ASK_AGAIN):
        sys.exit("error: some chunks got no answer: run the same command again for them")


async def rewrite(options: RewriteOptions) -> Counter[str]:
    """Appends to the output; returns how many chunks had which status."""
    path = Path(options.output)
    tokenizer, done = build_tokenizer(options.tokenizer), written(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    teacher = build_teacher(options.teacher, judging=False)
    counts: Counter[str] = Counter()
    try:
        with path.open("ab") as output:
            for batch in _batches(options, tokenizer, done):
                result = await teacher.rewrite(RewriteRequest(tuple(chunk.item for chunk in batch)))
                records, failed = [], ""
                for chunk, answer in zip(batch, result.rewrites, strict=True):
                    prefix, text = chunk.item.prefix, answer.text
                    status = "copied" if answer.copied else "rewritten" if text is not None else kind_of(answer.failure)
                    counts[status] += 1
                    if status in _ASK_AGAIN:
                        failed = answer.failure
                        continue
                    if text is not None and not answer.copied:
                        ids = tokenizer.encode_continuation(text)[: options.rewrite_suffix_length]
                        text = tokenizer.decode_continuation(prefix.tokens, ids)
                    record = {"line": chunk.line, "chunk": chunk.number, "prefix": prefix.text}
                    record |= {"suffix": chunk.item.suffix.text, "rewrite": text, "status": status}
                    records.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                output.write(b"".join(records))
                output.flush()
                unanswered = f"; without an answer: {failed}" if failed else ""
                print(f"{counts.total():,} chunks asked for{unanswered}", file=sys.stderr)
                if not records:
                    break
    finally:
        await teacher.aclose()
    return counts


def written(path: Path) -> set[tuple[int, int]]:
    """(line, chunk) of what an earlier run wrote; a last line that it did not finish is cut off."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        records = [orjson.loads(line) for line in whole.splitlines()]
        return {(record["line"], record["chunk"]) for record in records}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"output {path} is not of this tool ({error!r}): give another --output") from error


def _batches(options: RewriteOptions, tokenizer: Tokenizer, done: set[tuple[int, int]]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    for line, text in _documents(options):
        if line % options.num_shards != options.shard:
            continue
        for chunk in _chunks(line, text, tokenizer, options):
            if (chunk.line, chunk.number) not in done:
                batch.append(chunk)
        if len(batch) >= options.chunks_at_a_time:
            yield batch
            batch = []
    if batch:
        yield batch


def _documents(options: RewriteOptions) -> Iterator[tuple[int, str]]:
    """(number of the line over all files, text)."""
    number = 0
    for lines in read_batches(expand_inputs(options.input)):
        for line in lines.lines:
            number += 1
            if not line.strip():
                continue
            try:
                record: Any = orjson.loads(line)
                text = record[options.json_key]
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(f"input line {number} has no {options.json_key!r} ({error!r}): mend it") from error
            yield number, str(text)


def _chunks(line: int, text: str, tokenizer: Tokenizer, options: RewriteOptions) -> Iterator[Chunk]:
    tokens = np.asarray(tokenizer.encode(text), dtype=np.int64)
    length = options.rewrite_suffix_length
    for number, start in enumerate(range(length, len(tokens), length), start=1):
        prefix = tokens[max(0, start - options.rewrite_prefix_length) : start]
        suffix = tokens[start : start + length]
        item = RewriteItem(
            line,
            Passage(prefix, tokenizer.decode(prefix)),
            Passage(suffix, tokenizer.decode_continuation(prefix, suffix)),
        )
        yield Chunk(line, number, item)


if __name__ == "__main__":
    main()
