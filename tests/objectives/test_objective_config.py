"""Values of the objective's options that cannot work are refused with value and remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.objectives import ObjectiveConfig


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dpo_beta": 0.0}, "--dpo-beta is 0.0"),
        ({"dpo_label_smoothing": 0.5}, "--dpo-label-smoothing is 0.5"),
        ({"dpo_nll_weight": -1.0}, "--dpo-nll-weight is -1.0"),
        ({"reference_sync_interval": 0}, "--reference-sync-interval is 0"),
        ({"reference_ema_decay": 1.0}, "--reference-ema-decay is 1.0"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        replace(ObjectiveConfig(), **change).validate()


def test_defaults_are_valid() -> None:
    ObjectiveConfig().validate()
