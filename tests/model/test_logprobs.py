"""Vocab-parallel log-probabilities against a dense softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks


@pytest.mark.parametrize(("vocab_size", "case"), [(13, "padding on the second rank"), (7, "a rank of padding only")])
def test_log_probs_and_gradients_equal_a_dense_softmax_over_the_real_vocabulary(vocab_size: int, case: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, 3, 16, generator=generator) * 30  # wide: a softmax without its maximum would overflow
    logits[..., vocab_size:] = 1e4  # would win, if it took part
    targets = torch.randint(0, vocab_size, (5, 3), generator=generator)
    coefficients = torch.randn(5, 3, generator=generator)

    dense = logits[..., :vocab_size].double().requires_grad_()
    expected = dense.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    (expected * coefficients.double()).sum().backward()

    payload = {"logits": logits, "targets": targets, "coefficients": coefficients, "vocab_size": vocab_size}
    reports = run_ranks(2, "tests.model.claims:vocab_parallel_claims", payload)
    gradient = np.concatenate([report["gradient"] for report in reports], axis=-1)
    assert dense.grad is not None
    np.testing.assert_allclose(gradient[..., :vocab_size], dense.grad.numpy(), atol=1e-5)
    assert np.all(gradient[..., vocab_size:] == 0)
    for report in reports:
        np.testing.assert_allclose(report["scores"], expected.detach().numpy(), atol=1e-4, rtol=1e-5)
        assert report["logits_untouched"] and report["twice_the_same"], "Megatron's own overwrites both"


@pytest.mark.parametrize(("vocab_size", "case"), [(13, "padding on the second rank"), (7, "a rank of padding only")])
def test_blocks_of_the_output_layer_equal_a_dense_softmax_in_both_directions(vocab_size: int, case: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(5, 6, generator=generator) * 3
    weight = torch.randn(16, 6, generator=generator) * 3
    targets = torch.randint(0, vocab_size, (5,), generator=generator)
    coefficients = torch.randn(5, generator=generator)
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    expected = (h @ w[:vocab_size].t()).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (expected * coefficients.double()).sum().backward()
    assert h.grad is not None and w.grad is not None

    payload = {
        "hidden": hidden, "weight": weight, "targets": targets, "coefficients": coefficients, "vocab_size": vocab_size,
    }  # fmt: skip
    reports = run_ranks(2, "tests.model.claims:output_layer_claims", payload)
    for report in reports:
        assert "not the one that was announced" in report.pop("refusal")
        assert len(report) == 4
    for way in reports[0]:
        ranks = [report[way] for report in reports]
        together = np.concatenate([rank["weight"] for rank in ranks])
        np.testing.assert_allclose(together, w.grad.numpy(), atol=2e-5, err_msg=way)
        for rank in ranks:
            np.testing.assert_allclose(rank["scores"], expected.detach().numpy(), atol=2e-5, err_msg=way)
            np.testing.assert_allclose(rank["hidden"], h.grad.numpy(), atol=2e-5, err_msg=way)
            assert rank["flag"], way
