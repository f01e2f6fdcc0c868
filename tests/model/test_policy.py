"""The policy against transformers' Llama: logits, log-probs and gradients at every layout.

Covers TP, sequence parallelism, 1F1B and interleaved pipelines with micro-batches of two widths, full and selective
recomputation, ragged prefixes, vocabulary padding, tied embeddings. Does not cover Transformer Engine and CUDA.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_sip.types import RowLayout
from tests.model.reference import VOCAB_SIZE, make_llama, make_qwen, reference_gradients, reference_log_probs
from tests.model.rows import Rows, make_rows
from tests.ranks import run_ranks

RECOMPUTE = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
LAYOUTS: dict[str, tuple[int, dict[str, int], list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "1x1": (1, {}, [({}, {}), ({}, RECOMPUTE), ({}, SELECTIVE)]),
    "tensor 2": (
        2, {"tensor_model_parallel_size": 2},
        [({}, {}), ({"sequence_parallel": True}, {}), ({"sequence_parallel": True}, RECOMPUTE)],
    ),
    "pipeline 2": (
        2, {"pipeline_model_parallel_size": 2},
        [({}, {}), ({"num_layers_per_virtual_pipeline_stage": 1}, RECOMPUTE)],
    ),
    "tensor 2, pipeline 2": (
        4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        [({"sequence_parallel": True, "num_layers_per_virtual_pipeline_stage": 1}, SELECTIVE)],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_llama()


@pytest.fixture(scope="module")
def batches() -> list[Rows]:
    """Two micro-batches of different widths, with prefixes from one token to the whole block."""
    return [
        make_rows(1, RowLayout(prefix_block=14, num_candidates=2, candidate_block=9), [14, 1, 6], VOCAB_SIZE),
        make_rows(2, RowLayout(prefix_block=11, num_candidates=3, candidate_block=5), [4, 11, 9], VOCAB_SIZE),
    ]


@pytest.fixture(scope="module", params=list(LAYOUTS))
def runs(request: pytest.FixtureRequest, llama: Any, batches: list[Rows]) -> list[list[dict[str, Any]]]:
    """The reports of all variants of a layout, each by rank: one launch for all claims."""
    world_size, sizes, variants = LAYOUTS[request.param]
    payload = {
        "sizes": sizes,
        "variants": variants,
        "weights": dict(llama.state_dict()),
        "gradients": reference_gradients(llama, batches),
        "batches": batches,
        "probe": _probe(),
        "moved": _moved_positions(),
    }
    ranks = run_ranks(world_size, "tests.model.claims:variants", payload)
    return [[rank[variant] for rank in ranks] for variant in range(len(variants))]


def _probe() -> Rows:
    return make_rows(3, RowLayout(prefix_block=24, num_candidates=0, candidate_block=0), [24, 24], VOCAB_SIZE)


def _moved_positions() -> torch.Tensor:
    """Positions that jump, other in each row."""
    return torch.stack((torch.arange(24) + 7, torch.cat((torch.arange(12), torch.arange(20, 32)))))


def _whole_logits(reports: list[dict[str, Any]], key: str) -> np.ndarray:
    parts = [report[key] for report in sorted(reports, key=lambda r: r["tp_rank"]) if report["last"]]
    whole = np.concatenate(parts, axis=-1)
    assert whole.shape[-1] >= 64 and np.all(np.isneginf(whole[..., VOCAB_SIZE:])), "padded columns are no tokens"
    return whole[..., :VOCAB_SIZE]


def test_logits_equal_those_of_llama(runs: list[list[dict[str, Any]]], llama: Any) -> None:
    with torch.no_grad():
        expected = llama(_probe().tokens).logits.numpy()
    for reports in runs:
        np.testing.assert_allclose(_whole_logits(reports, "logits"), expected, atol=1e-4, rtol=1e-4)


def test_positions_given_per_row_are_what_rope_turns_by(runs: list[list[dict[str, Any]]], llama: Any) -> None:
    with torch.no_grad():
        expected = llama(_probe().tokens, position_ids=_moved_positions()).logits.numpy()
        unmoved = llama(_probe().tokens).logits.numpy()
    assert np.abs(expected[1] - unmoved[1]).max() > 0.01, "a model that ignores positions would pass"
    for reports in runs:
        np.testing.assert_allclose(_whole_logits(reports, "moved_logits"), expected, atol=1e-4, rtol=1e-4)


def test_shared_prefix_rows_score_as_separate_sequences(
    runs: list[list[dict[str, Any]]], llama: Any, batches: list[Rows]
) -> None:
    with torch.no_grad():
        expected = [reference_log_probs(llama, rows).numpy() for rows in batches]
    for reports in runs:
        for report in reports:
            assert len(report["log_probs"]) == (len(batches) if report["last"] else 0)
            for scores, reference, rows in zip(report["log_probs"], expected, batches, strict=False):
                real = rows.coefficients.numpy() != 0
                np.testing.assert_allclose(scores[real], reference[real], atol=1e-4, rtol=1e-4)
                assert scores.dtype == np.float32


def test_gradients_of_shared_prefix_rows_equal_those_of_separate_sequences(runs: list[list[dict[str, Any]]]) -> None:
    for reports in runs:
        for report in reports:
            wrong = {name: error for name, error in report["gradient_errors"].items() if not error < 1e-4}
            assert not wrong, wrong
            assert len(report["gradient_errors"]) >= 7


@pytest.fixture(scope="module")
def fresh_logits() -> np.ndarray:
    return np.array(run_ranks(1, "tests.model.claims:first_logits", _probe().tokens)[0])


def test_a_fresh_model_does_not_depend_on_the_layout(
    runs: list[list[dict[str, Any]]], fresh_logits: np.ndarray
) -> None:
    assert fresh_logits.std() > 0.01
    for reports in runs:
        np.testing.assert_allclose(_whole_logits(reports, "fresh_logits")[0, :4], fresh_logits, atol=1e-5)


def test_generation_without_sequence_parallelism_takes_rows_that_do_not_divide(
    runs: list[list[dict[str, Any]]], llama: Any
) -> None:
    with torch.no_grad():
        expected = llama(_probe().tokens[:, :23]).logits.numpy()
    for reports in runs:
        np.testing.assert_allclose(_whole_logits(reports, "odd_logits"), expected, atol=1e-4, rtol=1e-4)
        assert all(report["sequence_parallel_again"] for report in reports)


def test_rows_that_do_not_divide_are_refused_under_sequence_parallelism(runs: list[list[dict[str, Any]]]) -> None:
    for reports in runs:
        for report in reports:
            assert ("pad the prefix block" in report["refusal"]) == report["sequence_parallel"]


def test_only_the_asked_positions_pass_through_the_output_layer(runs: list[list[dict[str, Any]]]) -> None:
    shapes = {report["shapes"] for reports in runs for report in reports} - {None}
    assert shapes <= {(3, 2, 32)}


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_head_norms_and_biases_score_and_learn_as_qwens(tensor_parallel_size: int) -> None:
    qwen = make_qwen()
    batches = [make_rows(8, RowLayout(prefix_block=8, num_candidates=2, candidate_block=4), [3, 8], VOCAB_SIZE)]
    payload = {
        "sizes": {"tensor_model_parallel_size": tensor_parallel_size},
        "variants": [({}, {"qk_layernorm": True, "add_qkv_bias": True, "use_rope_scaling": False})],
        "weights": dict(qwen.state_dict()),
        "gradients": reference_gradients(qwen, batches),
        "batches": batches,
        "probe": _probe(),
        "moved": _moved_positions(),
    }
    reports = [rank[0] for rank in run_ranks(tensor_parallel_size, "tests.model.claims:variants", payload)]
    with torch.no_grad():
        expected = qwen(_probe().tokens).logits.numpy()
    np.testing.assert_allclose(_whole_logits(reports, "logits"), expected, atol=1e-4, rtol=1e-4)
    for report in reports:
        assert any("q_layernorm" in name for name in report["gradient_errors"])
        assert max(report["gradient_errors"].values()) < 1e-4


def test_tied_embeddings_score_and_learn_as_llamas() -> None:
    tied = make_llama(tied=True)
    batches = [make_rows(4, RowLayout(prefix_block=8, num_candidates=1, candidate_block=4), [3, 8], VOCAB_SIZE)]
    payload = {
        "sizes": {},
        "variants": [({}, {"untie_embeddings_and_output_weights": False})],
        "weights": dict(tied.state_dict()),
        "gradients": reference_gradients(tied, batches),
        "batches": batches,
        "probe": _probe(),
        "moved": _moved_positions(),
    }
    report = run_ranks(1, "tests.model.claims:variants", payload)[0][0]
    with torch.no_grad():
        expected = tied(_probe().tokens).logits.numpy()
    np.testing.assert_allclose(_whole_logits([report], "logits"), expected, atol=1e-4, rtol=1e-4)
    assert max(report["gradient_errors"].values()) < 1e-4


def test_a_bfloat16_policy_keeps_angles_and_log_probs_in_float32(llama: Any) -> None:
    rows = make_rows(6, RowLayout(prefix_block=10, num_candidates=2, candidate_block=4), [10, 5], VOCAB_SIZE)
    first, last = run_ranks(
        2, "tests.model.claims:bfloat16_claims", {"weights": dict(llama.state_dict()), "rows": rows}
    )
    for report in (first, last):
        assert report["parameters"] == ["torch.bfloat16"] and report["frequencies"] == "torch.float32"
    assert first["output"] == "torch.bfloat16" and last["output"] == "torch.float32"
    with torch.no_grad():
        expected = reference_log_probs(llama, rows).numpy()
    real = rows.coefficients.numpy() != 0
    assert last["log_probs"][0].dtype == np.float32
    np.testing.assert_allclose(last["log_probs"][0][real], expected[real], atol=0.25)
