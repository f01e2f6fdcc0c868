"""Vocab-parallel log-probabilities against a dense softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sip.model import output_layer
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


@pytest.mark.parametrize("tile_logits", [1, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_a_block_equal_a_dense_softmax_in_both_directions(dtype: torch.dtype, tile_logits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 6, generator=generator).to(dtype) for n in (7, 16))
    targets = torch.randint(0, 13, (7,), generator=generator)
    coefficients = torch.randn(7, generator=generator)
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    expected = (h @ w[:13].t()).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (expected * coefficients.double()).sum().backward()
    assert h.grad is not None and w.grad is not None

    payload = {
        "hidden": hidden, "weight": weight, "targets": targets, "coefficients": coefficients, "vocab_size": 13,
        "tile_logits": tile_logits,
    }  # fmt: skip
    (report,) = run_ranks(1, "tests.model.claims:tiled_output_layer_claims", payload)
    # Logits up to about 8 and their gradients are rounded to bfloat16's 8 bits, as products in it are everywhere.
    atol = 2e-5 if dtype == torch.float32 else 0.04
    for way, found in report.items():
        np.testing.assert_allclose(found["scores"], expected.detach().numpy(), atol=atol, err_msg=way)
        np.testing.assert_allclose(found["hidden"], h.grad.numpy(), atol=atol, err_msg=way)
        np.testing.assert_allclose(found["weight"], w.grad.numpy(), atol=atol, err_msg=way)
        assert np.all(found["weight"][13:] == 0)


@pytest.mark.parametrize(
    ("device", "positions", "columns", "bytes_per_logit", "rows"),
    [
        # 24 MiB of bfloat16 are 393 rows of 32,000; 1,024 positions make three blocks, of 342 or rather 352.
        ("cpu", 1024, 32000, 2, [352, 352, 320]),
        # Of float32 they are 49 rows of 128,256: a seventh of the positions (74, or rather 80), 128 at most.
        ("cpu", 2048, 128256, 4, [128] * 16),
        ("cpu", 512, 128256, 4, [80] * 6 + [32]),
        # 64 MiB on a GPU are 261 rows in bfloat16: an eighth of 2,048 is less.
        ("cuda", 2048, 128256, 2, [256] * 8),
        ("cuda", 512, 128256, 2, [64] * 8),
        ("cpu", 0, 32000, 2, []),
    ],
)
def test_a_block_is_small_beside_all_logits_and_large_enough_to_be_quick(
    device: str, positions: int, columns: int, bytes_per_logit: int, rows: list[int]
) -> None:
    step = output_layer._rows_per_block(output_layer._SIZES[device], positions, columns * bytes_per_logit)
    assert [part.stop - part.start for part in output_layer._cut(positions, step)] == rows
