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
