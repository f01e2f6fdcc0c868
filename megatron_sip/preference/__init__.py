"""Judgments -> preferences -> micro-batches of shared-prefix rows, and their statistics."""

from typing import TYPE_CHECKING

from megatron_sip.lazy import imported_when_asked_for
from megatron_sip.preference.advantages import (
    GroupAdvantages,
    group_advantages,
    reward_metrics,
    reward_sums,
    without_missing,
)
from megatron_sip.preference.config import PreferenceConfig
from megatron_sip.preference.select import select
from megatron_sip.preference.stats import preference_metrics, preference_sums

if TYPE_CHECKING:
    from megatron_sip.preference.rows import (
        Row,
        RowShape,
        build_rows,
        candidate_rows,
        chosen_rows,
        group_rows,
        longest_first,
        pair_rows,
    )
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        rows="Row RowShape build_rows candidate_rows chosen_rows group_rows longest_first pair_rows",
    )

__all__ = [
    "GroupAdvantages",
    "PreferenceConfig",
    "Row",
    "RowShape",
    "build_rows",
    "candidate_rows",
    "chosen_rows",
    "group_advantages",
    "group_rows",
    "longest_first",
    "pair_rows",
    "preference_metrics",
    "preference_sums",
    "reward_metrics",
    "reward_sums",
    "select",
    "without_missing",
]
