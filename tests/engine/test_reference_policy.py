"""The reference policy: which weights it holds after each step, and that scoring under it leaves the policy alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.settings import PAYLOAD
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Scores after 0 to 4 steps for each kind of reference and place of its weights."""
    return run_ranks(1, "tests.engine.claims:references", PAYLOAD)[0]


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_frozen_reference_scores_as_the_policy_did_at_the_start(found: dict[str, Any], place: str) -> None:
    scores = found[f"frozen {place}"]
    assert all(step == scores["policy"][0] for step in scores["reference"])
    assert scores["policy"][4] != scores["policy"][0]
    assert scores["versions"] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_synced_reference_is_the_policy_of_every_second_step(found: dict[str, Any], place: str) -> None:
    scores = found[f"synced {place}"]
    assert scores["reference"] == [scores["policy"][step] for step in (0, 0, 2, 2, 4)]
    assert scores["versions"] == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("place", ["device", "host"])
def test_an_ema_reference_is_the_weighted_sum_of_the_weights(found: dict[str, Any], place: str) -> None:
    scores = found[f"ema {place}"]
    average = scores["first weight"][0]
    for weights in scores["first weight"][1:]:
        average = [0.75 * a + 0.25 * w for a, w in zip(average, weights, strict=True)]
    assert scores["first reference"] == pytest.approx(average, rel=1e-5)
    assert scores["versions"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["frozen", "synced", "ema"])
def test_where_the_weights_wait_changes_nothing(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind} host"] == found[f"{kind} device"]
