"""The embedded factuality judge: overlap with the original suffix. It compares words, not facts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sip.teacher.interfaces import JudgeGroup, JudgeIdentity, Question, Verdict, passages_hash

_CONTENT_WORD = re.compile(r"\d[\d.,]*|[^\W\d_]{4,}")
SUPPORTED = 0.5
"""At least this share of content words stands in the reference or the prefix: no hallucination."""
DOUBTFUL = 0.2
"""At least this share: a possible one."""


class OverlapFactualityJudge:
    """Pointwise: 1, 0.5 or 0 by the share of a candidate's content words (numbers, words of 4 letters or more) that
    stand in the original suffix or in the prefix. A text without content words claims nothing: 1."""

    criterion = "factuality"

    def identity(self) -> JudgeIdentity:
        return JudgeIdentity("overlap", f"{SUPPORTED} {DOUBTFUL}", sampling="")

    def prompt_hash(self, question: Question) -> str:
        group = question.group
        return passages_hash([group.prefix, group.reference, group.candidates[question.options[0]]])

    async def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        return [self._verdict(question.group, question.options[0]) for question in questions]

    def _verdict(self, group: JudgeGroup, candidate: int) -> Verdict:
        claimed = _content(group.candidates[candidate].text)
        known = _content(group.reference.text) | _content(group.prefix.text)
        share = len(claimed & known) / len(claimed) if claimed else 1.0
        score = 1.0 if share >= SUPPORTED else 0.5 if share >= DOUBTFUL else 0.0
        return Verdict(score, raw=f"{share:.3f} supported")


def _content(text: str) -> set[str]:
    return {word.casefold().rstrip(".,") for word in _CONTENT_WORD.findall(text)}
