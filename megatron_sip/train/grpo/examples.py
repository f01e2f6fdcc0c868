"""Looks at all examples before the first step: what would end the run when its turn comes ends it at its start."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from megatron_sip.data.config import parse_blend
from megatron_sip.data.lines import LinesDataset
from megatron_sip.train.grpo.tasks import Task

_LONGEST = 64
"""Examples of a file whose prompts are made: those with the most characters besides the prefix, which can be cut."""


def check_examples(values: Sequence[str], flag: str, task: Task) -> int:
    """Raises ``DataError`` for the first line of the files that is no example of the ``task``, or whose prompt cannot
    be made to fit; returns the number of examples. Tokens go by characters only roughly: a prompt that is too long by
    a little may be found in its turn."""
    count = 0
    for path in parse_blend(values, flag)[0]:
        dataset = LinesDataset(path)
        lengths = [task.measure(dataset.get(index, 0, index)) for index in range(len(dataset))]
        for index in heapq.nlargest(_LONGEST, range(len(dataset)), key=lengths.__getitem__):
            task.prompt(dataset.get(index, 0, index))
        count += len(dataset)
    return count
