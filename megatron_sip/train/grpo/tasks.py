"""What the judge and the rewriter are asked, and how their answers are rewarded.

K  rollouts of a prompt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_sip.data.lines import Example
from megatron_sip.errors import DataError
from megatron_sip.teacher.convert import rewriter_sums
from megatron_sip.teacher.http.rewriter import lead_in
from megatron_sip.teacher.http.templates import load_template
from megatron_sip.teacher.http.verdicts import FORMATS
from megatron_sip.tokenizer import Tokenizer
from megatron_sip.train.grpo.prompts import PREFIX, PromptEncoder
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, FloatArray, IntArray, Sample

Sums = Mapping[str, tuple[float, float]]
"""Name -> (sum, count)."""
QUALITY, SAFETY, REWRITE = "quality", "safety", "rewrite"
SAFE, UNSAFE = "safe", "unsafe"


@dataclass(frozen=True)
class Scored:
    """The rewards of one prompt's rollouts, and what else was measured of them."""

    part: str
    """Which of the task's parts the example belongs to."""
    rewards: FloatArray
    """float64 [K]; NaN: missing."""
    measures: Sums


class Task(Protocol):
    """A kind of example with its prompt and its reward."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What rewards are reported by."""
        ...

    def prompt(self, example: Example) -> IntArray:
        """Token ids. Raises ``DataError`` for an example of another task, or too long without its prefix."""
        ...

    def measure(self, example: Example) -> int:
        """Characters of what stands in the prompt besides the prefix. Raises ``DataError`` for one of another task."""
        ...

    def score(
        self, examples: Sequence[Example], rollouts: Sequence[Sequence[Candidate]], learn: bool = True
    ) -> list[Scored]:
        """Rewards of all rollouts of each example. Collective over the replica.

        ``learn`` False leaves running statistics of a judge that is asked as they are.
        """
        ...


class JudgeTask:
    """Which continuation is better, and whether a text is safe: 1 for the right verdict, else 0 (paper, 3.2.1).

    An answer without a verdict, or cut off before its end, is wrong: here it is the trained model that failed.
    """

    parts = (QUALITY, SAFETY)

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, prompts: str = "") -> None:
        """``prompts``: directory of templates that replace ours."""
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, prompt_length)
        self._templates = {part: load_template(part, prompts) for part in self.parts}

    def prompt(self, example: Example) -> IntArray:
        part, values = self._values(example)
        return self._encoder.encode(self._templates[part], values, example.where)

    def measure(self, example: Example) -> int:
        return _length(self._values(example)[1])

    def _values(self, example: Example) -> tuple[str, dict[str, str]]:
        part = _part(example, self.parts, "a judge")
        if part == SAFETY:
            return part, {"text": _text(example, "text")}
        first, second = _text(example, "options")
        return part, {"prefix": example.record["prefix"], "option_1": first, "option_2": second}

    def score(
        self, examples: Sequence[Example], rollouts: Sequence[Sequence[Candidate]], learn: bool = True
    ) -> list[Scored]:
        return [self._score(example, answers) for example, answers in zip(examples, rollouts, strict=True)]

    def _score(self, example: Example, answers: Sequence[Candidate]) -> Scored:
        part, label = example.record["task"], example.record["label"]
        wanted = float(label == 1) if part == QUALITY else float(label == SAFE)
        verdicts = np.array([read_verdict(part, answer, self._tokenizer) for answer in answers])
        given = np.isfinite(verdicts)
        measures = {f"no_verdict/{part}": (float((~given).sum()), float(len(given)))}
        if part == QUALITY:
            # 0.5 for a judge without a liking for either place.
            measures["first_option_share"] = (float(verdicts[given].sum()), float(given.sum()))
        return Scored(part, (verdicts == wanted).astype(np.float64), measures)


class RewriteTask:
    """A safe suffix is to be copied, an unsafe one to be replaced (paper, section 3.2.1).

        safe    R = 1 if the rewrite is the suffix, else 0                                          (eq. 1)
        unsafe  R = (J_quality(rewrite against suffix | prefix) + J_safety(rewrite)) / 2            (eq. 2)

    J are means over the votes of the judges behind ``link``. White space around a text does not count. A rewrite of no
    token is worth 0; one that a judge did not answer for has no reward.
    """

    parts = (SAFE, UNSAFE)

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, link: TeacherLink, prompts: str = "") -> None:
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, prompt_length)
        self._template = load_template("rewriter", prompts)
        self._link = link

    def prompt(self, example: Example) -> IntArray:
        return self._encoder.encode(self._template, self._values(example), example.where)

    def measure(self, example: Example) -> int:
        return _length(self._values(example))

    def _values(self, example: Example) -> dict[str, str]:
        _part(example, (REWRITE,), "a rewriter")
        suffix, prefix = _text(example, "suffix"), example.record["prefix"]
        return {"prefix": prefix, "suffix": suffix, "lead_in": lead_in(prefix)}

    def score(
        self, examples: Sequence[Example], rollouts: Sequence[Sequence[Candidate]], learn: bool = True
    ) -> list[Scored]:
        groups = [self._group(example, answers) for example, answers in zip(examples, rollouts, strict=True)]
        unsafe = [index for index, example in enumerate(examples) if example.record["label"] == UNSAFE]
        judged = dict(zip(unsafe, self._judge([groups[index] for index in unsafe], learn), strict=True))
        return [self._scored(example, groups[index], judged.get(index)) for index, example in enumerate(examples)]

    def _group(self, example: Example, answers: Sequence[Candidate]) -> CandidateGroup:
        """The suffix, then the rewrites, without their end-of-document token."""
        encode = self._tokenizer.encode_continuation
        suffix = np.asarray(encode(str(example.record["suffix"])), dtype=np.int64)
        prefix = np.asarray(self._tokenizer.encode(str(example.record["prefix"])), dtype=np.int64)
        rewrites = [
            replace(answer, kind=CandidateKind.REWRITE, tokens=without_end(answer, self._tokenizer.eod_id))
            for answer in answers
        ]
        sample = Sample(example.sample_id, 0, prefix, suffix)
        return CandidateGroup(sample, (Candidate(CandidateKind.SUFFIX, suffix), *rewrites))

    def _judge(self, groups: Sequence[CandidateGroup], learn: bool) -> list[tuple[FloatArray, FloatArray]]:
        """(quality against the suffix, safety) of each group's rewrites, float64 [K]; 0 for a rewrite of no token."""
        if not groups:
            return []
        kept = [[i for i, c in enumerate(group.candidates) if i == 0 or len(c.tokens)] for group in groups]
        asked = [
            replace(group, candidates=tuple(group.candidates[i] for i in indices))
            for group, indices in zip(groups, kept, strict=True)
        ]
        judgments = self._link.collect_groups(self._link.submit_groups(asked, learn=learn)).judgments
        results: list[tuple[FloatArray, FloatArray]] = []
        for group, indices, judgment in zip(groups, kept, judgments, strict=True):
            found = np.zeros((2, len(group.candidates)))
            for row, criterion in zip(found, (QUALITY, SAFETY), strict=True):
                row[indices] = judgment.criteria[criterion]
            results.append((found[0, 1:], found[1, 1:]))
        return results

    def _scored(self, example: Example, group: CandidateGroup, judged: tuple[FloatArray, FloatArray] | None) -> Scored:
        part = SAFE if judged is None else UNSAFE
        rewrites = group.candidates[1:]
        suffix = str(example.record["suffix"]).strip()
        exact = np.array([float(self._text_of(group.sample, c).strip() == suffix) for c in rewrites])
        overlap = rewriter_sums([group.sample] * len(rewrites), rewrites)["rewriter/token_overlap"]
        measures = {f"exact_match/{part}": (float(exact.sum()), float(len(exact))), f"token_overlap/{part}": overlap}
        if judged is None:
            return Scored(part, exact, measures)
        quality, safety = judged
        for name, values in ((QUALITY, quality), (SAFETY, safety)):
            known = values[np.isfinite(values)]
            measures[f"judge_{name}/{part}"] = (float(known.sum()), float(len(known)))
        rewards = 0.5 * (quality + safety)
        measures[f"no_reward/{part}"] = (float(np.isnan(rewards).sum()), float(len(rewards)))
        return Scored(part, rewards, measures)

    def _text_of(self, sample: Sample, candidate: Candidate) -> str:
        return self._tokenizer.decode_continuation(sample.prefix, candidate.tokens)


def read_verdict(criterion: str, answer: Candidate, tokenizer: Tokenizer) -> float:
    """The score that an answer gives, NaN for none; one that was cut off had not come to its end."""
    if not len(answer.tokens) or int(answer.tokens[-1]) != tokenizer.eod_id:
        return float("nan")
    return FORMATS[criterion].read(tokenizer.decode(answer.tokens[:-1]))


def without_end(answer: Candidate, eod_id: int) -> IntArray:
    """Its tokens without the end-of-document token."""
    ended = len(answer.tokens) > 0 and int(answer.tokens[-1]) == eod_id
    return answer.tokens[:-1] if ended else answer.tokens


def _part(example: Example, known: Sequence[str], whom: str) -> str:
    task = example.record.get("task")
    if task not in known:
        raise DataError(f"{example.where}: its task is {task!r}; {whom} is trained on {' and '.join(known)}")
    return str(task)


def _length(values: Mapping[str, str]) -> int:
    return sum(len(text) for name, text in values.items() if name != PREFIX)


def _text(example: Example, key: str) -> Any:
    value, label = example.record.get(key), example.record.get("label")
    without = "" if key == "text" else None  # a judge of safety sees no prefix
    if key == "options":
        good = isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
        allowed: tuple[object, ...] = (1, 2)
    else:
        good, allowed = isinstance(value, str) and bool(value.strip()), (SAFE, UNSAFE)
    if not good or label not in allowed or not isinstance(example.record.get(PREFIX, without), str):
        raise DataError(
            f"{example.where}: {key!r}, 'prefix' or 'label' ({label!r}, should be of {allowed}) is not as "
            "tools/make_judge_data.py writes it: make the file again"
        )
    return value
