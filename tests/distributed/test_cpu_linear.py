"""Linear layers on CPU: products, gradients, and outputs that may be changed in place, as Megatron-Core does."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.distributed.cpu_linear import linear_for_megatron, look_up


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_may_be_changed_in_place_and_have_the_gradients_of_torch(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(size, generator=generator) for size in (shape, (7, 8), (7,))]
    ours, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    bias = ours[2] if with_bias else None
    output = linear_for_megatron(ours[0], ours[1], bias, False, False, False)
    output.mul_(2.0)
    expected = 2 * torch.nn.functional.linear(theirs[0], theirs[1], theirs[2] if with_bias else None)
    torch.testing.assert_close(output, expected)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    for our, their in zip(ours[: 2 + with_bias], theirs, strict=False):
        # Sums of up to 30 products of about 10, in another order: float32 rounds them at 1e-5.
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("buffered", [False, True])
def test_a_look_up_gives_its_rows_alone_a_gradient(buffered: bool) -> None:
    weight = torch.nn.Parameter(torch.arange(10.0).view(5, 2).bfloat16())
    if buffered:
        weight.main_grad = torch.ones(5, 2)  # type: ignore[attr-defined]
    found = look_up(torch.tensor([[3, 0], [3, 1]]), weight)
    assert found.tolist() == [[[6, 7], [0, 1]], [[6, 7], [2, 3]]]
    # 256 + 1 in bfloat16 is 256: the sum for row 3 is float32's in the buffer.
    found.backward(torch.tensor([[[256, 2], [3, 4]], [[1, 5], [6, 7]]]).bfloat16())
    rows = [[3.0, 4.0], [6.0, 7.0], [0.0, 0.0], [257.0 if buffered else 256.0, 7.0], [0.0, 0.0]]
    gradient = weight.main_grad - 1 if buffered else weight.grad  # type: ignore[attr-defined]
    assert gradient.tolist() == rows
    assert getattr(weight, "grad_added_to_main_grad", False) == buffered, "DDP would add what nobody wrote"
