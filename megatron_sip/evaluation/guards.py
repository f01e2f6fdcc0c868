"""Guards against a policy that wins by pleasing the judge: statistics of its continuations that real text bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_sip.observability.text_statistics import (
    Tokens,
    distinct_n,
    max_token_share,
    mean_length,
    repeated_ngram_share,
    shared_ngram_share,
)

MIN_DISTINCT_2 = 0.33
MAX_TOKEN_SHARE = 0.25
MAX_REPEATED_TRIGRAMS = 0.15


@dataclass(frozen=True)
class Guards:
    """Pooled over one continuation per prefix. Shares fall or rise with the number of prefixes: compare at the same."""

    num_continuations: int
    length: float
    """Mean tokens."""
    distinct_2: float
    """Distinct bigrams over all bigrams."""
    max_token_share: float
    """Share of the most frequent token."""
    repeated_trigrams: float
    """Share of trigrams that repeat an earlier one of the same continuation."""
    boilerplate: float
    """Share of trigrams that occur in continuations of two prefixes or more."""

    def violations(self) -> list[str]:
        """Guards that are broken, as sentences. Boilerplate has no limit: compare it with that of the real suffixes."""
        checks = [
            (self.distinct_2 < MIN_DISTINCT_2, f"distinct-2 {self.distinct_2:.3f} < {MIN_DISTINCT_2}"),
            (self.max_token_share > MAX_TOKEN_SHARE, f"one token {self.max_token_share:.1%} > {MAX_TOKEN_SHARE:.0%}"),
            (
                self.repeated_trigrams > MAX_REPEATED_TRIGRAMS,
                f"repeated trigrams {self.repeated_trigrams:.1%} > {MAX_REPEATED_TRIGRAMS:.0%}",
            ),
        ]
        return [message for broken, message in checks if broken]

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def measure_guards(continuations: Sequence[Tokens]) -> Guards:
    """Guards of one continuation per prefix, as token ids."""
    return Guards(
        num_continuations=len(continuations),
        length=mean_length(continuations),
        distinct_2=distinct_n(continuations, 2),
        max_token_share=max_token_share(continuations),
        repeated_trigrams=repeated_ngram_share(continuations, 3),
        boilerplate=shared_ngram_share([[tokens] for tokens in continuations], 3),
    )
