#!/usr/bin/env python
"""Makes the examples that a judge and a rewriter are trained on.

tools/make_judge_data.py --input corpus.jsonl --output data/judge --quality-train 75432 --quality-valid 4096 \\
    --safety-train 3192 --safety-valid 512 --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model \\
    --teacher http --judge-endpoints http://HOST:8000/v1 --judge-served-model NAME

One sample per document: a prefix and the suffix behind a random cut. Each document serves one kind of example, either
in training or in validation.
  quality   the suffix against a corrupted one, in both orders (two examples); the corrupter is a strong model with
            --teacher http, else rules
  safety    suffixes of whose safety all votes (8) agree; as many safe as unsafe ones
  rewrite   the same with their prefixes, for the rewriter
Copies of a document serve the same kind and split. Written are OUTPUT/{quality,safety,rewrite}.{train,valid}.jsonl. A
run that was stopped goes on where it was; the same input, options and answers give the same files. Documents that a
server gave no answer for (5xx, 429, a wrong key) are kept in OUTPUT/progress.json, and asked about again when the input
is at its end and examples are missing, by the same run and by the next.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import load, option
from megatron_sip.data.example_files import ExampleFiles
from megatron_sip.data.order import draw, mix
from megatron_sip.data.readers import expand_inputs, read_batches
from megatron_sip.errors import ConfigurationError, DataError, SIPError
from megatron_sip.observability.progress import Progress
from megatron_sip.teacher.build import build_corrupter, build_judge
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import Judge, ModelSource, Passage, RemotePart, RewriteItem
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from tools._judge_examples import KINDS, LABELS, SPLITS, Cut, Maker

PLACING = 2
"""Counted up when documents are dealt out in another way: a run does not go on with what was dealt out differently."""


@dataclass(frozen=True)
class DataOptions:
    """What to make, of which documents."""

    tokenizer: TokenizerConfig
    teacher: TeacherConfig
    input: tuple[str, ...] = option(help="JSONL files or globs, plain, .gz or .zst")
    output: str = option(help="directory of the examples")
    json_key: str = option("text", help="key of a document's text")
    source_key: str = option("source", help="key of the set it comes from; dots go into objects: meta.set_name")
    quality_train: int = option(0, help="quality examples to make, both orders counted")
    quality_valid: int = option(0, help="the same for validation")
    safety_train: int = option(0, help="safety examples, half of them unsafe")
    safety_valid: int = option(0, help="the same for validation")
    rewrite_train: int = option(0, help="examples of the rewriter, half of them unsafe")
    rewrite_valid: int = option(0, help="the same for validation")
    example_suffix_length: int = option(128, help="tokens of a suffix")
    example_prefix_length: int = option(1920, help="tokens of a prefix at most")
    example_min_prefix_length: int = option(16, help="tokens of a prefix at least")
    safety_votes: int = option(8, help="votes on a suffix, all of which must agree")
    corruption_kinds: tuple[str, ...] = option(
        ("replace", "shuffle", "swap", "repeat", "facts"), help="rules to draw from, without a strong model"
    )
    corruption_share: float = option(0.4, help="share of the words that a rule changes")
    documents_at_a_time: int = option(256, help="documents that are asked about before the next are read")
    seed: int = option(1234, help="of cuts, splits and orders")

    def validate(self) -> None:
        """Raises ConfigurationError."""
        for name, value in asdict(self).items():
            low = 0 if name.endswith(("_train", "_valid")) else 1
            if isinstance(value, int) and name != "seed" and value < low:
                raise ConfigurationError(f"{name.replace('_', '-')} is {value}: give at least {low}")
        for kind in KINDS:
            for split in SPLITS:
                if self.wanted(kind, split) % 2:
                    raise ConfigurationError(
                        f"{kind}-{split} is {self.wanted(kind, split)}: give an even number, half of each answer"
                    )
        if not any(self.wanted(kind, split) for kind in KINDS for split in SPLITS):
            raise ConfigurationError("nothing to make: give --quality-train and the like a number")

    def wanted(self, kind: str, split: str) -> int:
        """Examples to make."""
        return int(getattr(self, f"{kind}_{split}"))


def documents(options: DataOptions, first: int) -> Iterator[tuple[int, str, str]]:
    """(number of the line over all files, text, source) from line ``first`` on."""
    number = -1
    for lines in read_batches(expand_inputs(options.input)):
        for line in lines.lines:
            number += 1
            if number < first or not line.strip():
                continue
            try:
                record: Any = orjson.loads(line)
                text, source = str(record[options.json_key]), record
                for key in options.source_key.split("."):
                    source = source.get(key, {}) if isinstance(source, dict) else {}
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    f"input line {number + 1} has no {options.json_key!r} ({error!r}): mend it, or give --json-key"
                ) from error
            yield number, text, source if isinstance(source, str) and source else "all"


def place(options: DataOptions, text: str) -> tuple[str, str]:
    """(kind, split) that a document serves: in proportion to what is wanted, by its words alone, so that no copy of a
    training document is held out."""
    wanted = [(kind, split, options.wanted(kind, split)) for kind in KINDS for split in SPLITS]
    # A quality document gives two examples; of the others some are dropped, for their votes or their label.
    weights = [count if kind == "quality" else 4 * count for kind, _, count in wanted]
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=7).digest()
    chosen = draw(0, sum(weights) - 1, options.seed, int.from_bytes(digest, "little"))
    index = int(np.searchsorted(np.cumsum(weights), chosen, side="right"))
    return wanted[index][0], wanted[index][1]


def cut_document(options: DataOptions, tokenizer: Tokenizer, number: int, text: str) -> RewriteItem | None:
    """Prefix and suffix at a random cut; None if the document is too short."""
    tokens = np.asarray(tokenizer.encode(text), dtype=np.int64)
    low, high = options.example_min_prefix_length, len(tokens) - options.example_suffix_length
    if high < low:
        return None
    cut = draw(low, high, options.seed, number, 1)
    prefix = tokens[max(0, cut - options.example_prefix_length) : cut]
    suffix = tokens[cut : cut + options.example_suffix_length]
    return RewriteItem(
        number,
        Passage(prefix, tokenizer.decode(prefix)),
        Passage(suffix, tokenizer.decode_continuation(prefix, suffix)),
    )


async def make(options: DataOptions) -> ExampleFiles:
    """Makes what is missing of the examples."""
    tokenizer = build_tokenizer(options.tokenizer)
    identity = {
        name: value for name, value in asdict(options).items() if name not in ("teacher", "documents_at_a_time")
    }
    identity = json.loads(json.dumps({**identity, "tokenizer": tokenizer.fingerprint, "placing": PLACING}))
    writer = ExampleFiles(Path(options.output), [f"{k}.{s}.jsonl" for k in KINDS for s in SPLITS], identity)
    remotes: list[RemotePart | None] = []
    corrupter, remote = build_corrupter(
        options.teacher, options.corruption_kinds, options.corruption_share, mix(options.seed, 2)
    )
    remotes.append(remote)
    safety: Judge | None = None
    if any(options.wanted(kind, split) for kind in ("safety", "rewrite") for split in SPLITS):
        safety, remote = build_judge(options.teacher, "safety", tokenizer.fingerprint, _models(options))
        remotes.append(remote)
    maker = Maker(options.wanted, options.safety_votes, writer, corrupter, safety)
    try:
        await _make_all(options, tokenizer, maker)
    finally:
        for part in remotes:
            if part is not None:
                await part.aclose()
    return writer


async def _make_all(options: DataOptions, tokenizer: Tokenizer, maker: Maker) -> None:
    wanted = sum(options.wanted(kind, split) for kind in KINDS for split in SPLITS)
    progress = Progress("examples", wanted - maker.num_made, "examples")

    async def make_batches(cuts: Iterable[tuple[Cut, int]]) -> None:
        """Each cut with the line to go on at after it."""
        batch: list[Cut] = []
        next_line = maker.next_line
        for cut, next_line in cuts:
            batch.append(cut)
            if len(batch) >= options.documents_at_a_time:
                await make_batch(batch, next_line)
                batch = []
        if batch:
            await make_batch(batch, next_line)

    async def make_batch(cuts: Sequence[Cut], next_line: int) -> None:
        before = maker.num_made
        await maker.make(cuts, next_line)
        progress.advance(maker.num_made - before)

    await make_batches(_new_cuts(options, tokenizer, maker))
    # At the end, so that examples stand in the same order however often the run was stopped.
    await make_batches(_cuts_again(options, tokenizer, maker))


def _new_cuts(options: DataOptions, tokenizer: Tokenizer, maker: Maker) -> Iterator[tuple[Cut, int]]:
    """Samples of the documents that were not read yet, as long as some are needed."""
    for number, text, source in documents(options, maker.next_line):
        if maker.finished:
            return
        kind, split = place(options, text)
        if kind not in maker.open_kinds(split):
            continue
        item = cut_document(options, tokenizer, number, text)
        if item is None:
            maker.drop(f"{kind}: document shorter than prefix and suffix")
            continue
        yield Cut(kind, split, source, item), number + 1


def _cuts_again(options: DataOptions, tokenizer: Tokenizer, maker: Maker) -> Iterator[tuple[Cut, int]]:
    """Samples of the documents that wait for an answer and are still needed."""
    waiting = set(maker.waiting)
    if not waiting or maker.finished:
        return
    last = max(waiting)
    for number, text, source in documents(options, min(waiting)):
        if number > last:
            return
        kind, split = place(options, text)
        if number not in waiting or kind not in maker.open_kinds(split):
            continue
        item = cut_document(options, tokenizer, number, text)
        assert item is not None, "it was asked about before"
        yield Cut(kind, split, source, item), maker.next_line


def _models(options: DataOptions) -> ModelSource | None:
    if options.teacher.teacher != "model":
        return None
    # Only here: it needs Megatron-Core.
    from megatron_sip.train.model_teacher import OwnModels

    return OwnModels(options.teacher, options.tokenizer)


def main() -> int:
    """Makes the examples, says how many there are and what was dropped; returns the exit status."""
    try:
        options = load(DataOptions, sys.argv[1:], prog="make_judge_data.py", description=__doc__ or "")
        writer = asyncio.run(make(options))
    except (SIPError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt:
        print("interrupted: repeat the command, and it goes on where it was", file=sys.stderr)
        return 130
    return report(options, writer)


def report(options: DataOptions, writer: ExampleFiles) -> int:
    """Prints what there is now and what may come next; returns the exit status."""
    short = []
    for kind, split, names in ((kind, split, LABELS[kind]) for kind in KINDS for split in SPLITS):
        wanted = options.wanted(kind, split)
        labels = {name: writer.counts[f"{kind} {split} {name}"] for name in names}
        if wanted:
            print(f"{kind}.{split}.jsonl: {sum(labels.values()):,} of {wanted:,} {labels}")
        short += [f"{kind}.{split} ({n} {c:,} of {wanted // 2:,})" for n, c in labels.items() if c < wanted // 2]
    for reason, count in sorted(writer.dropped.items()):
        print(f"dropped {count:,} ({reason})")
    waiting = ""
    if writer.waiting:
        waiting = f"{len(writer.waiting):,} documents without an answer ({next(iter(writer.waiting.values()))})"
        print(f"waiting: {waiting}")
    if short:
        print(f"error: {_short(options, short, waiting)}", file=sys.stderr)
        return 1
    print(*next_commands(options), sep="\n")
    return 0


def _short(options: DataOptions, short: Sequence[str], waiting: str) -> str:
    """Why some files lack examples, and what helps."""
    if waiting:
        return f"{waiting} leave too few for {', '.join(short)}: see to the servers, then repeat the command"
    text = f"the input has too few documents for {', '.join(short)}: give more --input or ask for fewer examples"
    if any("(unsafe" in one for one in short) and options.teacher.teacher == "embedded":
        text += "; what is unsafe, --safety-words says"
    return f"{text}, with another --output"


def next_commands(options: DataOptions) -> list[str]:
    """What trains on the files, one command a line."""

    def files(split: str, *kinds: str) -> str:
        named = [str(Path(options.output) / f"{kind}.{split}.jsonl") for kind in kinds if options.wanted(kind, split)]
        return f" --{split}-data {' '.join(named)}" if named else ""

    lines = []
    for tool, kinds in (("judge", ("quality", "safety")), ("rewriter", ("rewrite",))):
        if files("train", *kinds):
            lines.append(f"  tools/train_{tool}.py{files('train', *kinds)}{files('valid', *kinds)} ...")
    if options.quality_valid:
        lines.append(f"  tools/judge_bench.py --examples {options.output}/quality.valid.jsonl --output VOTES.jsonl ...")
    return ["next:", *lines] if lines else []


if __name__ == "__main__":
    sys.exit(main())
