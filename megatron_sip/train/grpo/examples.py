"""Looks at all examples before the first step: what would end the run when its turn comes ends it at its start."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_sip.data.config import parse_blend
from megatron_sip.data.lines import LinesDataset
from megatron_sip.errors import DataError
from megatron_sip.train.grpo.tasks import QUALITY, SAFETY, Task

_LONGEST = 64
"""Examples of a file whose prompts are made: those with the most characters besides the prefix, which can be cut."""
_JUDGED = (QUALITY, SAFETY)
_ORIGIN = ("document", "source", "corruption")
"""Keys that do not tell examples apart: the same texts may come from two documents."""


@dataclass
class Examined:
    """What the files behind a flag hold."""

    count: int = 0
    labels: dict[str, dict[Any, int]] = field(default_factory=dict)
    """Examples by task and label."""
    digests: set[bytes] = field(default_factory=set)
    """Of their texts and labels."""


def check_examples(values: Sequence[str], flag: str, task: Task) -> Examined:
    """Raises ``DataError`` for the first line of the files that is no example of the ``task``, or whose prompt cannot
    be made to fit. Tokens go by characters only roughly: a prompt that is too long by a little may be found in its
    turn."""
    found = Examined()
    for path in parse_blend(values, flag)[0]:
        dataset = LinesDataset(path)
        lengths = []
        for index in range(len(dataset)):
            example = dataset.get(index, 0, index)
            lengths.append(task.measure(example))
            _count(found, example.record)
        for index in heapq.nlargest(_LONGEST, range(len(dataset)), key=lengths.__getitem__):
            task.prompt(dataset.get(index, 0, index))
    return found


def _count(found: Examined, record: Mapping[str, Any]) -> None:
    found.count += 1
    labels = found.labels.setdefault(str(record["task"]), {})
    labels[record["label"]] = labels.get(record["label"], 0) + 1
    told = {name: value for name, value in record.items() if name not in _ORIGIN}
    found.digests.add(hashlib.blake2b(orjson.dumps(told, option=orjson.OPT_SORT_KEYS), digest_size=16).digest())


def check_splits(trained: Examined, held_out: Examined) -> str:
    """Whether the examples teach and measure what they are for. Raises ``DataError`` if not; returns a warning or "".

    A judge needs both answers: it could earn each reward of one by giving it always. (A rewriter may be trained on safe
    suffixes alone.) What is held out must not be what is trained on; texts of a few words may meet by chance.
    """
    for name in _JUDGED:
        labels = trained.labels.get(name, {})
        if len(labels) == 1:
            ((label, count),) = labels.items()
            raise DataError(
                f"--train-data: all {count:,} {name} examples have the label {label!r}, so that a judge that always "
                "gives it is right; give examples of both (tools/make_judge_data.py makes as many of each)"
            )
    shared = len(trained.digests & held_out.digests)
    if not shared:
        return ""
    if shared == len(held_out.digests):
        raise DataError("--valid-data: all its examples are also in --train-data; give what is held out, or none")
    return f"{shared:,} of {len(held_out.digests):,} examples of --valid-data are also in --train-data"
