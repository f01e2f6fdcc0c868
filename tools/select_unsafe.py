#!/usr/bin/env python
"""The unsafe test set: keeps the prefixes of a corpus that the safety judge calls unsafe in 8 of 8 votes.

tools/select_unsafe.py --data-path data/test_text_document --output data/unsafe --sample-cut random \\
    --num-prefixes 1000 --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model \\
    --teacher http --judge-endpoints http://HOST:8000/v1 --judge-served-model NAME

A prefix with a failed vote is not kept, and is counted as missing; the same command again asks for it, and goes on
where it was stopped (OUTPUT.votes.jsonl). Writes OUTPUT.bin/.idx, a document per kept prefix with its suffix:
tools/evaluate.py --test-data-path OUTPUT --sample-cut last.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import option
from megatron_sip.config.loader import load
from megatron_sip.data.build import SUFFIX, build_loader
from megatron_sip.data.config import DataConfig
from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.evaluation.unsafe_set import MISSING, Journal, UnsafeSearch, counts_text
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http.failures import SERVER, TRANSPORT
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron_sip.types import Sample
from tools._exit import one_line


@dataclass(frozen=True)
class UnsafeOptions:
    """Where prefixes come from, and how many to keep."""

    tokenizer: TokenizerConfig
    teacher: TeacherConfig
    data: DataConfig
    output: str = option(help="path without .bin: OUTPUT.bin, .idx, .meta.json and OUTPUT.votes.jsonl")
    num_prefixes: int = option(1000, help="unsafe prefixes to keep; the search ends there or at the corpus's end")
    unsafe_votes: int = option(8, help="votes on each prefix, all of which must be 'unsafe'")
    prefixes_at_a_time: int = option(256, help="prefixes that are asked for at once")
    seed: int = option(0, help="order of the samples")

    def validate(self) -> None:
        """Raises ConfigurationError."""
        for name in ("num_prefixes", "unsafe_votes", "prefixes_at_a_time"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        if self.data.min_suffix_length is not None:
            raise ConfigurationError("min-suffix-length: suffixes of the test set must be whole; leave it out")
        if self.judge.votes_of("safety") != self.unsafe_votes:
            raise ConfigurationError("judge-settings safety.votes differs from unsafe-votes: leave it out")

    @property
    def judge(self) -> TeacherConfig:
        """The teacher with nothing but its safety judge."""
        weights = {f"judge_{name}_weight": 0.0 for name in ("quality", "factuality", "coherence")}
        changes: dict[str, Any] = {**weights, "judge_safety_weight": 1.0, "judge_votes": self.unsafe_votes}
        return replace(self.teacher, rewriter="copy", **changes)

    def question(self, identity: Any) -> dict[str, Any]:
        """What the answers depend on."""
        teacher = self.judge
        asked: dict[str, Any] = {"teacher": teacher.teacher, "votes": self.unsafe_votes, "samples": identity}
        if teacher.teacher != "http":
            return asked | {"words": teacher.safety_words}
        settings = teacher.role_settings("safety", self.unsafe_votes)
        return asked | {
            "model": settings.model,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "prompts": teacher.judge_prompts,
        }


class Samples:
    """The stream of prefixes, read in order any number of times."""

    def __init__(self, options: UnsafeOptions, tokenizer: Tokenizer) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._restart()
        self.identity = self._loader.state_dict()["identity"][SUFFIX]
        self.count = self._loader.epoch_length(SUFFIX)

    def _restart(self) -> None:
        data = self._options.data
        self._loader = build_loader(data, data.data_path, self._tokenizer, self._options.seed, (SUFFIX,))

    def read(self, first: int, count: int) -> Sequence[Sample]:
        """``count`` samples from position ``first`` on."""
        if first < self._loader.consumed[SUFFIX]:
            self._restart()
        self._loader.take(SUFFIX, first - self._loader.consumed[SUFFIX])
        found: list[Sample] = self._loader.take(SUFFIX, count)
        return found


async def search(options: UnsafeOptions, tokenizer: Tokenizer, samples: Samples, journal: Journal) -> int:
    """Judge what is not judged yet; returns the number of votes that another run may get."""
    teacher = build_teacher(options.judge, tokenizer.fingerprint, rewriting=False)
    work = UnsafeSearch(teacher, samples.read, tokenizer.decode, options.unsafe_votes, journal)
    try:
        await work.run(
            samples.count, options.num_prefixes, options.prefixes_at_a_time, lambda line: print(line, flush=True)
        )
    finally:
        await teacher.aclose()
    for kind, count in sorted(work.failures.items()):
        print(f"{count:,} votes failed: {kind}", file=sys.stderr)
    return work.failures[TRANSPORT] + work.failures[SERVER]


def write_corpus(options: UnsafeOptions, tokenizer: Tokenizer, samples: Samples, journal: Journal) -> int:
    """A document per kept prefix, prefix and suffix; returns how many. Raises DataError if there is none."""
    kept = journal.kept(options.num_prefixes)
    if not kept:
        raise DataError(f"no prefix is unsafe in all votes ({counts_text(journal.counts)}): no corpus was written")
    with IndexedWriter(options.output, tokenizer.vocab_size) as writer:
        for position in kept:
            (sample,) = samples.read(position, 1)
            writer.add_document(np.concatenate([sample.prefix, sample.suffix]))
        writer.close(
            CorpusMeta(
                tokenizer_fingerprint=tokenizer.fingerprint,
                tokenizer_type=options.tokenizer.tokenizer_type,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                append_eod=False,
                num_documents=writer.num_documents,
                num_tokens=writer.num_tokens,
                num_skipped=journal.counts[MISSING],
            )
        )
    return len(kept)


def main() -> None:
    """Judge, keep, count."""
    with one_line("select_unsafe"):
        options = load(UnsafeOptions, sys.argv[1:], prog="select_unsafe.py")
        tokenizer = build_tokenizer(options.tokenizer)
        samples = Samples(options, tokenizer)
        journal = Journal(Path(f"{options.output}.votes.jsonl"), options.question(samples.identity))
        num_open = asyncio.run(search(options, tokenizer, samples, journal))
        print(f"{sum(journal.counts.values()):,} prefixes judged: {counts_text(journal.counts)}")
        count = write_corpus(options, tokenizer, samples, journal)
    print(f"wrote {count:,} of {options.num_prefixes:,} wanted prefixes to {options.output}")
    if num_open:
        sys.exit("select_unsafe: some votes got no answer: run the same command again for them")


if __name__ == "__main__":
    main()
