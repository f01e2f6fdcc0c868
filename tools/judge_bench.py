#!/usr/bin/env python
"""Measures a judge on examples with known answers; compares judges and prompts that were measured.

    tools/judge_bench.py --examples data/judge/quality.valid.jsonl --output runs/bench/8b.jsonl FLAGS
    tools/judge_bench.py --compare runs/bench/8b.jsonl runs/bench/120b.jsonl

Examples come from tools/make_judge_data.py. Quality: accuracy per source set, liking for a place (both orders are
asked), for a text that is complete (each pair is asked again with one option cut off and the other not). Safety: the
answers given to safe and unsafe texts. Factuality (--criterion factuality, quality examples): how original and
corrupted continuations are labelled. Any teacher: --teacher embedded, http or model. Votes are kept in the output, one
line each: a run that was stopped goes on where it was. A vote that failed is missing, and is asked again then.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import load, option
from megatron_sip.errors import ConfigurationError, DataError, SIPError
from megatron_sip.evaluation.judge_bench import (
    AS_IS,
    BAD_COMPLETE,
    GOOD_COMPLETE,
    LABELS,
    Vote,
    accuracy_by_source,
    agreement,
    completed,
    confusion,
    cut_off,
    pair_biases,
)
from megatron_sip.files import write_bytes
from megatron_sip.observability.progress import Progress
from megatron_sip.teacher.build import build_judge
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http.waiting import await_servers
from megatron_sip.teacher.interfaces import Judge, JudgeGroup, ModelSource, Passage, Question
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from tools._exit import warn

_BATCH = 256
_FIELDS = {
    "quality": ("prefix", "options", "label", "source"),
    "safety": ("text", "label", "source"),
    "rewrite": ("prefix", "suffix", "label", "source"),
}
"""What examples of a task have."""
COMPARE = "--compare"


@dataclass(frozen=True)
class BenchOptions:
    """What to ask, and whom."""

    tokenizer: TokenizerConfig
    teacher: TeacherConfig
    examples: str = option(help="JSONL file of tools/make_judge_data.py")
    output: str = option(help="JSONL file of votes; those that are there already are kept")
    criterion: str = option(
        "", help="what to ask [the examples' task]", choices=("", "quality", "safety", "factuality")
    )
    num_examples: int = option(500, help="examples to ask about; of quality, pairs")
    votes: int = option(1, help="votes on each question")
    completeness: bool = option(True, help="ask quality pairs again with one option cut off")

    def validate(self) -> None:
        """Raises ConfigurationError."""
        for name in ("num_examples", "votes"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")


@dataclass(frozen=True)
class Asked:
    """A question with what its vote will be recorded as."""

    question: Question
    example: int
    source: str
    form: str
    good_first: bool

    @property
    def key(self) -> tuple[int, str, bool, int]:
        return self.example, self.form, self.good_first, self.question.vote


class Examples:
    """Questions about the examples of a file."""

    def __init__(self, options: BenchOptions, tokenizer: Tokenizer) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._records = list(_records(options.examples))
        self.criterion = options.criterion or str(self._records[0]["task"])
        if self.criterion not in LABELS and self.criterion != "quality":
            raise DataError(
                f"{options.examples} holds {self.criterion} examples, which no judge is asked about: give quality's or "
                "safety's"
            )
        needed = "safety" if self.criterion == "safety" else "quality"
        if any(record["task"] != needed for record in self._records):
            raise DataError(f"{options.examples} holds no {needed} examples alone, which {self.criterion} is asked on")

    def questions(self) -> Iterator[Asked]:
        """All questions, example by example."""
        if self.criterion == "safety":
            texts = ((record, [(record["label"], record["text"])]) for record in self._records)
        else:
            # Each pair stands there in both orders: one of them is enough.
            pairs = (record for record in self._records if record["label"] == 1)
            if self.criterion == "quality":
                yield from self._pairs(pairs)
                return
            kinds = ("suffix", "corrupted")
            texts = ((record, list(zip(kinds, record["options"], strict=True))) for record in pairs)
        for number, (record, named) in enumerate(islice(texts, self._options.num_examples)):
            group = self._group(number, record.get("prefix", ""), [text for _, text in named])
            for index, (form, _) in enumerate(named):
                for vote in range(self._options.votes):
                    yield Asked(Question(group, (index,), vote), number, record["source"], form, True)

    def _pairs(self, records: Iterator[Mapping[str, Any]]) -> Iterator[Asked]:
        for number, record in enumerate(islice(records, self._options.num_examples)):
            good, bad = record["options"]
            forms = {AS_IS: (good, bad)}
            if self._options.completeness:
                forms |= {GOOD_COMPLETE: (completed(good), cut_off(bad)), BAD_COMPLETE: (cut_off(good), completed(bad))}
            for form, texts in forms.items():
                group = self._group(number, record["prefix"], texts)
                for options in ((0, 1), (1, 0)):
                    for vote in range(self._options.votes):
                        yield Asked(Question(group, options, vote), number, record["source"], form, options[0] == 0)

    def _group(self, number: int, prefix: str, texts: Sequence[str]) -> JudgeGroup:
        passages = tuple(Passage(np.asarray(self._tokenizer.encode_continuation(text)), text) for text in texts)
        start = Passage(np.asarray(self._tokenizer.encode(prefix)), prefix)
        return JudgeGroup(number, start, passages[0], passages, ("suffix", "rewrite")[: len(texts)])


def _records(path: str) -> Iterator[dict[str, Any]]:
    try:
        lines = Path(path).read_bytes().splitlines()
        records = [orjson.loads(line) for line in lines]
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"--examples {path}: {error}; make it with tools/make_judge_data.py") from error
    if not records:
        raise DataError(f"--examples {path}: it is empty; make it with tools/make_judge_data.py")
    for number, record in enumerate(records, start=1):
        needed = _FIELDS.get(str(record.get("task")), ("task",)) if isinstance(record, dict) else ("task",)
        lacking = [name for name in needed if not isinstance(record, dict) or name not in record]
        if lacking:
            raise DataError(f"--examples {path}:{number}: no {lacking[0]!r}; make it with tools/make_judge_data.py")
    yield from records


def read_votes(path: Path) -> tuple[dict[str, Any], list[Vote]]:
    """What an output says of itself, and its votes. A last line that was not finished is left out."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    try:
        header, rows = orjson.loads(lines[0]), [orjson.loads(line) for line in lines[1:]]
        votes = [Vote(**{**row, "favoured": math.nan if row["favoured"] is None else row["favoured"]}) for row in rows]
        return header["about"], votes
    except (IndexError, KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path} is not of this tool ({error!r}): give another file") from error


async def measure(options: BenchOptions, models: ModelSource | None) -> tuple[dict[str, Any], list[Vote]]:
    """Asks what is not answered yet; returns what the output says of itself, and all votes."""
    tokenizer = build_tokenizer(options.tokenizer)
    examples = Examples(options, tokenizer)
    if options.teacher.teacher == "http":
        key = os.environ.get(options.teacher.judge_api_key_env, "")
        await_servers(options.teacher, {examples.criterion: 1}, key, warn)
    judge, remote = build_judge(options.teacher, examples.criterion, tokenizer.fingerprint, models)
    about = {"criterion": examples.criterion, "examples": options.examples, **asdict(judge.identity())}
    if examples.criterion == "factuality":
        about["variant"] = options.teacher.factuality_variant
    path = Path(options.output)
    questions = list(examples.questions())
    if not questions:
        raise DataError(f"--examples {options.examples} holds no pair with the good option first: give the whole file")
    # Of the first question: it changes with the prompt's wording.
    about["prompt"] = judge.prompt_hash(questions[0].question)
    known = _known(path, about)
    asked = [one for one in questions if one.key not in known]
    try:
        # Missing votes are not kept: they are asked again.
        _write(path, about, list(known.values()), "wb")
        progress = Progress(examples.criterion, len(asked), "votes")
        for start in range(0, len(asked), _BATCH):
            new, failure = await _ask(judge, asked[start : start + _BATCH])
            missing = f"; missing ones, for example {failure}" if failure else ""
            print(f"{min(start + _BATCH, len(asked)):,} of {len(asked):,} votes asked for{missing}", file=sys.stderr)
            _write(path, None, new, "ab")
            known |= {(vote.example, vote.form, vote.good_first, vote.number): vote for vote in new}
            progress.advance(len(new))
    finally:
        if remote is not None:
            await remote.aclose()
    return about, list(known.values())


def _known(path: Path, about: Mapping[str, Any]) -> dict[tuple[int, str, bool, int], Vote]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    before, votes = read_votes(path)
    if before != about:
        raise DataError(
            f"--output {path} holds votes of another judge or prompt or on other examples: give another file"
        )
    good = [vote for vote in votes if not math.isnan(vote.favoured)]
    return {(vote.example, vote.form, vote.good_first, vote.number): vote for vote in good}


async def _ask(judge: Judge, asked: Sequence[Asked]) -> tuple[list[Vote], str]:
    """The votes, and why one of them is missing, "" if none is."""
    verdicts = await judge.ask([one.question for one in asked])
    votes = []
    for one, verdict in zip(asked, verdicts, strict=True):
        favoured = verdict.score if one.good_first else 1 - verdict.score
        votes.append(Vote(one.example, one.source, one.form, one.good_first, one.question.vote, favoured))
    return votes, next((verdict.failure for verdict in verdicts if verdict.failure), "")


def _write(path: Path, about: Mapping[str, Any] | None, votes: Sequence[Vote], mode: str) -> None:
    rows: list[dict[str, Any]] = [] if about is None else [{"about": about}]
    rows += [{**asdict(vote), "favoured": None if math.isnan(vote.favoured) else vote.favoured} for vote in votes]
    data = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    if mode == "ab":
        with path.open("ab") as stream:
            stream.write(data)
        return
    write_bytes(path, data)


def describe(about: Mapping[str, Any], votes: Sequence[Vote]) -> str:
    """The tables of one judge."""
    lines = [f"{about['criterion']} by {about['name']} {about['model']} {about.get('variant', '')}".rstrip()]
    if about["criterion"] == "quality":
        lines += ["accuracy, %, per source set (± 95 % interval over pairs)"]
        lines += [f"  {source:<24}{share}" for source, share in accuracy_by_source(votes).items()]
        biases = pair_biases(votes)
        lines += [
            f"votes for the first option, %     {biases.first_share}",
            f"winner changes with the order, %  {biases.flips}",
            f"completeness bias, points         {_points(biases.completeness)}",
            f"missing votes, %                  {100 * biases.missing:.1f}",
        ]
        return "\n".join(lines)
    table = confusion(votes, about["criterion"])
    columns = _columns(about["criterion"], table)
    lines += [f"  {'judged':<12}" + "".join(f"{name:>24}" for name in columns)]
    for form, counts in sorted(table.items()):
        total = sum(counts.values())
        cells = (f"{counts[name]} ({100 * counts[name] / total:.1f} %)" for name in columns)
        lines.append(f"  {form:<12}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _points(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:+.1f}"


def _columns(criterion: str, table: Mapping[str, Mapping[str, int]]) -> list[str]:
    found = {name for counts in table.values() for name in counts}
    named = list(LABELS[criterion].values())
    order = [*named, *sorted(found - set(named))]
    return [name for name in order if name in found]


def compare(paths: Sequence[str]) -> str:
    """Tables of all, and how far each two agree.

    Judges out of checkpoints draw the same random numbers on the same prompt: two that are at 1/2 agree as well.
    """
    found = [(path, *read_votes(Path(path))) for path in paths]
    lines = [f"{path}\n{describe(about, votes)}\n" for path, about, votes in found]
    lines.append("agreement of majorities on the same questions: share, Cohen's kappa, questions")
    shares = []
    for index, (path, _, votes) in enumerate(found):
        for other, _, theirs in found[index + 1 :]:
            both = agreement(votes, theirs)
            if both.count:
                shares.append(both.share)
            lines.append(f"  {path} | {other}: {100 * both.share:.1f} %, {both.kappa:.3f}, {both.count}")
    if len(shares) > 1:
        mean = sum(shares) / len(shares)
        lines.append(f"  from {100 * min(shares):.1f} to {100 * max(shares):.1f} %, mean {100 * mean:.1f} %")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    try:
        if argv[:1] == [COMPARE]:
            if len(argv) == 1:
                raise ConfigurationError("--compare names no file: give two or more of --output")
            print(compare(argv[1:]))
            return 0
        options = load(BenchOptions, argv, prog="judge_bench.py", description=__doc__ or "")
        about, votes = asyncio.run(measure(options, _models(options)))
    except (SIPError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt:
        print("interrupted: repeat the command, and it goes on where it was", file=sys.stderr)
        return 130
    missing = sum(math.isnan(vote.favoured) for vote in votes)
    if missing == len(votes):
        print("error: no vote was answered: look at the judge, and run the same command again", file=sys.stderr)
        return 1
    print(describe(about, votes))
    print(json.dumps({"about": about, "missing": missing, "votes": len(votes)}))
    return 0


def _models(options: BenchOptions) -> ModelSource | None:
    if options.teacher.teacher != "model":
        return None
    # Only here: it needs Megatron-Core.
    from megatron_sip.train.model_teacher import OwnModels

    return OwnModels(options.teacher, options.tokenizer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
