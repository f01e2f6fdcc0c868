"""Every training variant of the paper's Tables 1, 2, 6, 7, 14 and 18 runs, and every reference policy and precision.

Covers: which losses a variant has, how many comparisons its judge makes, the first DPO loss. The corpus's documents
are numbers, which the rules of the rewriter leave alone: rewrites equal their suffixes here. Layouts are
test_training.py's subject. Does not cover a prompted or fine-tuned judge.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.train.runs import recipe, write_corpora

GROUPS = 4
JUDGED = [{"name": "judged", "rollout": 1.0}]
NLL = {"objective": "rf_nll", "preference_rule": "best"}
BASE: dict[str, Any] = {
    "train_iters": 2,
    "global_batch_size": GROUPS,
    "rollout_micro_batch_size": 2,
    "phases": JUDGED,
    "judge_quality_weight": 1.0,
    "judge_factuality_weight": 0.0,
    "quality_judge": "plain",
    "reference_policy": "frozen",
    "dpo_nll_weight": 0.0,
    "num_layers": 2,
}


def only(stream: str) -> dict[str, Any]:
    return {"phases": [{"name": stream, stream: 1.0}]}


def dpo(candidates: str, **changes: Any) -> dict[str, Any]:
    return {"candidates": candidates, "objective": "online_dpo", "preference_rule": "best_vs_worst", **changes}


VARIANTS: dict[str, tuple[dict[str, Any], str, float | None]] = {
    # recipe, name of the loss, comparisons a prompt: n (n - 1) / 2 of n candidates, n - 1 with a pivot
    "next-token baseline": (only("ntp"), "lm loss", None),
    "suffix-only baseline": (only("suffix"), "loss/suffix", None),
    "SFT on rewrites": (only("rewrite"), "loss/rewrite", None),
    "SFT on 1 rollout": ({**NLL, "candidates": "rollout:1", "preference_rule": "rollout"}, "loss/rf_nll", None),
    "DPO rewrite over rollout": (dpo("rewrite,rollout:1", preference_rule="rewrite>rollout"), "loss/dpo", None),
    "RF-NLL rollout vs rewrite": ({**NLL, "candidates": "rewrite,rollout:1"}, "loss/rf_nll", 1),
    "RF-NLL suffix vs rewrite": ({**NLL, "candidates": "suffix,rewrite"}, "loss/rf_nll", 1),
    "RF-NLL suffix vs rewrite vs rollout": ({**NLL, "candidates": "suffix,rewrite,rollout:1"}, "loss/rf_nll", 3),
    "DPO suffix vs 1 rollout": (dpo("suffix,rollout:1"), "loss/dpo", 1),
    "DPO rewrite vs 1 rollout": (dpo("rewrite,rollout:1"), "loss/dpo", 1),
    "DPO suffix vs 2": (dpo("suffix,rollout:2"), "loss/dpo", 3),
    "DPO suffix vs 4": (dpo("suffix,rollout:4"), "loss/dpo", 10),
    "DPO suffix vs 8": (dpo("suffix,rollout:8"), "loss/dpo", 36),
    "DPO suffix vs 16": (dpo("suffix,rollout:16"), "loss/dpo", 136),
    "DPO suffix vs rewrite vs 4": (dpo("suffix,rewrite,rollout:4"), "loss/dpo", 15),
    "DPO 4 only": (dpo("rollout:4"), "loss/dpo", 6),
    "DPO suffix as pivot for 4": (dpo("suffix,rollout:4", pair_schedule="pivot"), "loss/dpo", 4),
    "recomputed": (dpo("suffix,rollout:4", recompute_granularity="full"), "loss/dpo", 10),
    "partly recomputed": (dpo("suffix,rollout:4", recompute_granularity="selective"), "loss/dpo", 10),
    "reference on host": (dpo("suffix,rollout:4", reference_placement="host"), "loss/dpo", 10),
    "moving reference": (dpo("suffix,rollout:4", reference_policy="ema"), "loss/dpo", 10),
    "no reference": (dpo("suffix,rollout:4", reference_policy="none"), "loss/dpo", 10),
    "bf16": (dpo("suffix,rollout:4", bf16=True), "loss/dpo", 10),
}
WITHOUT_DIFFERENCE = "RF-NLL suffix vs rewrite"
PLAIN = "DPO suffix vs 4"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("variants")
    write_corpora(folder)
    judge = str(folder / "judge.npz")
    recipes = {
        name: recipe(folder, **{**BASE, **changes, "judge_model": judge, "run_dir": str(folder / f"run{number}")})
        for number, (name, (changes, _, _)) in enumerate(VARIANTS.items())
    }
    payload = {"recipes": recipes, "judge_corpus": str(folder / "validation"), "judge_model": judge}
    return run_ranks(1, "tests.train.variants:train_all", payload, timeout_s=240)[0]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != WITHOUT_DIFFERENCE])
def test_variant_learns_by_its_loss_from_the_comparisons_it_needs(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    _, loss, comparisons = VARIANTS[name]
    first, second = found[name]
    for record in (first, second):
        assert {key for key in record if key == "lm loss" or key.startswith("loss/")} == {loss}
        assert math.isfinite(record[loss]) and record["grad-norm"] > 0
        assert record.get("judge/comparisons_per_prompt") == comparisons
    assert second["consumed-samples"] == 2 * GROUPS


@pytest.mark.parametrize("name", [name for name, (_, loss, _) in VARIANTS.items() if loss == "loss/dpo"])
def test_first_dpo_loss_is_ln_2_where_the_reference_is_the_policy_itself(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    if name == "no reference":  # the reference is then uniform, and the policy is not
        assert abs(found[name][0]["loss/dpo"] - math.log(2)) > 1e-4
    else:
        assert found[name][0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)


def test_recomputation_and_the_references_place_change_nothing_and_bf16_little(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    plain = found[PLAIN]
    for name in ("recomputed", "partly recomputed", "reference on host"):
        for ours, theirs in zip(found[name], plain, strict=True):
            assert ours["loss/dpo"] == theirs["loss/dpo"], name
            assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-6), name
    # The weights differ by their rounding, so other tokens are sampled: only the size can be compared.
    assert found["bf16"][0]["grad-norm"] == pytest.approx(plain[0]["grad-norm"], rel=0.5)
    assert found["bf16"][0]["grad-norm"] != plain[0]["grad-norm"]


def test_candidates_without_a_difference_teach_nothing_and_are_counted(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    for record in found[WITHOUT_DIFFERENCE]:
        assert record["sip/pairs_skipped"] == GROUPS and record["grad-norm"] == 0
        assert "loss/rf_nll" not in record
