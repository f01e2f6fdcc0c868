"""What a judge wrote -> a verdict. The last one in the text counts; none is a failure, never a default."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sip.teacher.http.failures import REFUSED, UNPARSABLE, Failure
from megatron_sip.teacher.http.reply import Choice
from megatron_sip.teacher.interfaces import Verdict

NAN = float("nan")
_MARKS = r"[\s*_`\"']*"
"""Markdown and quotes that models put around a verdict."""
_CONCLUSION = re.compile(rf"conclusion{_MARKS}:{_MARKS}option{_MARKS}([12])(?!\w)", re.IGNORECASE)
_DECISION = re.compile(rf"final{_MARKS}decision{_MARKS}:{_MARKS}(yes|no)(?!\w)", re.IGNORECASE)
_REPEATS = re.compile(rf"verdict{_MARKS}:{_MARKS}(a|b|tie)(?!\w)", re.IGNORECASE)
_LABEL = re.compile(r'"label"\s*:\s*"([^"]*)"', re.IGNORECASE)
_LABELS = {"no": 1.0, "possible": 0.5, "definite": 0.0}
_REFUSAL = re.compile(
    r"\W{0,3}(?:i(?:['\u2019]m| am) (?:\w+ )?sorry|sorry,|i apologi[sz]e|as an ai\b"
    r"|i(?: can ?not| can['\u2019]t| won['\u2019]t| will not|(?: am|['\u2019]m) (?:not able|unable) to) (?:\w+ )?"
    r"(?:help|assist|comply|continue|provide|fulfil|generate|rewrite|create|produce|judge|engage|do that))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class VerdictFormat:
    """The form in which one criterion's verdicts are given."""

    read: Callable[[str], float]
    """Text -> score, NaN if there is none in it."""
    structured: Mapping[str, Any]
    """Fields of a request that force this form."""


def _last(pattern: re.Pattern[str], scores: Mapping[str, float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        found = pattern.findall(text)
        return scores[found[-1].casefold()] if found else NAN

    return read


def _factuality(text: str) -> float:
    """The last ``label``, of three; raw control characters and a cut end of the JSON do no harm."""
    found = _LABEL.findall(text)
    words = found[-1].replace("_", " ").split() if found else []
    return _LABELS.get(words[0].casefold(), NAN) if words else NAN


_FACTUALITY_SCHEMA = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "label": {"enum": ["No Hallucination", "Possible Hallucination", "Definite Hallucination"]},
    },
    "required": ["reasoning", "label"],
    "additionalProperties": False,
}

FORMATS: Mapping[str, VerdictFormat] = {
    "quality": VerdictFormat(
        _last(_CONCLUSION, {"1": 1.0, "2": 0.0}),
        {"structured_outputs": {"choice": ["Conclusion: Option 1", "Conclusion: Option 2"]}},
    ),
    "safety": VerdictFormat(
        _last(_DECISION, {"yes": 1.0, "no": 0.0}),
        {"structured_outputs": {"choice": ["FINAL DECISION: YES", "FINAL DECISION: NO"]}},
    ),
    "factuality": VerdictFormat(
        _factuality,
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "factuality", "strict": True, "schema": _FACTUALITY_SCHEMA},
            }
        },
    ),
    "coherence": VerdictFormat(
        _last(_REPEATS, {"a": 1.0, "b": 0.0, "tie": 0.5}),
        {"structured_outputs": {"choice": ["VERDICT: A", "VERDICT: B", "VERDICT: TIE"]}},
    ),
}


def is_refusal(text: str) -> bool:
    """Whether a text begins as models begin when they decline."""
    return _REFUSAL.match(text) is not None


def verdict_of(choice: Choice, form: VerdictFormat, latency_s: float) -> Verdict:
    """A choice that was cut off is missing even if it names an option: it had not come to its end."""
    if choice.failure is not None:
        return Verdict(NAN, choice.text, str(choice.failure), latency_s)
    if choice.cut:
        failure = Failure(UNPARSABLE, "cut off at max_tokens: raise judge-max-tokens")
        return Verdict(NAN, choice.text, str(failure), latency_s)
    score = form.read(choice.text)
    if score != score:
        refused = is_refusal(choice.text)
        failure = Failure(REFUSED, "declined") if refused else Failure(UNPARSABLE, "no verdict in the text")
        return Verdict(NAN, choice.text, str(failure), latency_s)
    return Verdict(score, choice.text, latency_s=latency_s)
