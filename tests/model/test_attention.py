"""Shared-prefix attention, its kernels, and a layer's element-wise parts against dense formulas in float64.

Covers ragged prefixes, grouped heads, several rows, both directions. Without a GPU the calls for CUDA are checked for
their signatures and shapes alone (on torch's meta device); their numbers by the tests marked gpu.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_sip.model import flash, kernels
from megatron_sip.model.attention import CausalPlan, SharedPrefixPlan
from megatron_sip.model.rope import Rotation, rotation_of
from megatron_sip.types import RowLayout

LAYOUT = RowLayout(prefix_block=11, num_candidates=3, candidate_block=5)
LENGTHS = [11, 1, 6]
HEADS, GROUPS, WIDTH = 4, 2, 8


def _draw(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, each [s, b, n, d]."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(LAYOUT.length, len(LENGTHS), heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _real() -> torch.Tensor:
    """bool [s, b]: what is no padding of a prefix."""
    real = torch.ones(LAYOUT.length, len(LENGTHS), dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        real[length : LAYOUT.prefix_block, row] = False
    return real


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[s, b, h * d] by a mask that is written down pair by pair."""
    length, rows = query.shape[:2]
    allowed = torch.zeros(rows, length, length, dtype=torch.bool)
    block = LAYOUT.candidate_block
    for row, prefix in enumerate(LENGTHS):
        for q in range(length):
            own = (q - LAYOUT.prefix_block) // block if q >= LAYOUT.prefix_block else None
            for k in range(q + 1):
                if own is None:
                    allowed[row, q, k] = True
                elif k < LAYOUT.prefix_block:
                    allowed[row, q, k] = k < prefix
                else:
                    allowed[row, q, k] = (k - LAYOUT.prefix_block) // block == own
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH)).masked_fill(~allowed[:, None], -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def _run(function: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, and gradients of query, key and value, the padding of prefixes left out of the loss."""
    inputs = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    output = function(*inputs)
    weight = (tensors[3] * _real()[..., None, None].to(tensors[3])).flatten(2)
    (output * weight).sum().backward()
    return [output.detach() * _real()[..., None].to(output), *(x.grad for x in inputs)]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prefix_attention_equals_a_dense_softmax_in_both_directions(dtype: torch.dtype) -> None:
    plan = SharedPrefixPlan(LAYOUT, torch.tensor(LENGTHS))
    tensors = _draw(dtype=dtype)
    expected = _run(_dense, [x.double() for x in tensors])
    found = _run(lambda q, k, v: plan.attend(1, q, k, v), tensors)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for name, ours, theirs in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert float((ours.double() - theirs).abs().max()) < tolerance, name


def test_a_row_without_candidates_is_causal() -> None:
    query, key, value, _ = _draw()
    plan = SharedPrefixPlan(RowLayout(LAYOUT.length, 0, 0), torch.tensor(LENGTHS))
    assert torch.equal(plan.attend(1, query, key, value), CausalPlan().attend(1, query, key, value))


def test_no_mask_and_no_copy_of_the_prefix_per_candidate_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool) -> Any:
        seen.append((tuple(query.shape), tuple(key.shape)))
        return flash.attend(query, key, value, causal=causal)

    monkeypatch.setattr("megatron_sip.model.attention.attend", spy)
    SharedPrefixPlan(LAYOUT, torch.tensor(LENGTHS)).attend(1, *_draw()[:3])
    assert seen == [
        ((3, 4, 11, 8), (3, 2, 11, 8)),
        ((9, 4, 5, 8), (9, 2, 5, 8)),
        *(((1, 4, 15, 8), (1, 2, length, 8)) for length in LENGTHS),
    ]


def test_cuda_kernels_take_our_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, width in ((torch.bfloat16, 12), (torch.float32, 12)):
        shapes = ((1, 4, 7, width), (1, 2, 9, width), (1, 2, 9, width))
        query, key, value = (torch.empty(shape, device="meta", dtype=dtype) for shape in shapes)
        output, log_sum = flash.attend(query, key, value, causal=False)
        assert output.shape == query.shape and log_sum.shape == (1, 4, 7) and log_sum.dtype == torch.float32
        grads = flash.attend_backward(log_sum, output, query, key, value, output, causal=False)
        assert [tuple(grad.shape) for grad in grads] == [tuple(x.shape) for x in (query, key, value)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prefix_attention_on_a_gpu_equals_the_cpus(dtype: torch.dtype) -> None:
    plan = SharedPrefixPlan(LAYOUT, torch.tensor(LENGTHS))
    expected = _run(lambda q, k, v: plan.attend(1, q, k, v), _draw())
    found = _run(lambda q, k, v: plan.attend(1, q, k, v), _draw("cuda", dtype))
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.cpu().float() - theirs).abs().max()) < (1e-4 if dtype == torch.float32 else 0.05)


def _both_directions(function: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    output = function(*inputs)
    generator = torch.Generator().manual_seed(9)
    (output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum().backward()
    return [output.detach(), *(x.grad for x in inputs)]  # type: ignore[list-item]


def _assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_rms_norm_and_its_gradients_equal_the_formula() -> None:
    x, weight = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(1)) * 3, torch.linspace(0.5, 2, 16)
    formula = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * w  # noqa: E731
    theirs = _both_directions(formula, x.double(), weight.double())
    _assert_same(_both_directions(lambda x, w: kernels.rms_norm(x, w, 0.1), x, weight), theirs)


def test_swiglu_and_its_gradient_equal_the_formula() -> None:
    x = torch.randn(7, 3, 10, generator=torch.Generator().manual_seed(1)) * 3
    formula = lambda x: x[..., :5] * torch.sigmoid(x[..., :5]) * x[..., 5:]  # noqa: E731
    _assert_same(_both_directions(kernels.swiglu, x), _both_directions(formula, x.double()))


def test_what_a_gpu_compiles_equals_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    # The functions themselves, uncompiled: a GPU's compiler is tested by the tests marked gpu.
    monkeypatch.setattr(kernels, "_is_compiled", lambda inputs: True)
    monkeypatch.setattr(kernels, "_compiled", lambda function: function)
    test_swiglu_and_its_gradient_equal_the_formula()
    test_split_and_rotation_equal_complex_multiplication()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_on_a_gpu_equal_the_cpus(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and not kernels._can_compile():
        pytest.skip("no compiler")
    monkeypatch.setattr(kernels, "_is_compiled", lambda inputs: compiled and inputs.device.type == "cuda")
    for widths in ((7, 3), (9, 1)):  # another width must do without another compilation
        generator = torch.Generator().manual_seed(1)
        shapes = ((10,), (GROUPS * (HEADS // GROUPS + 2) * WIDTH,), (1, WIDTH // 2))
        x, mixed, angles = (torch.randn(*widths, *shape, generator=generator) for shape in shapes)

        def rotate(mixed: torch.Tensor, angles: torch.Tensor = angles) -> torch.Tensor:
            rotation = Rotation(angles.cos().to(mixed.device), angles.sin().to(mixed.device))
            return torch.cat([p.flatten(2) for p in kernels.split_and_rotate(mixed, rotation, GROUPS, WIDTH)], dim=-1)

        _assert_same(_on("cuda", kernels.swiglu, x), _on("cpu", kernels.swiglu, x))
        _assert_same(_on("cuda", rotate, mixed), _on("cpu", rotate, mixed))


def _on(device: str, function: Any, given: torch.Tensor) -> list[torch.Tensor]:
    x = given.to(device).requires_grad_()
    output = function(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(device)
    (gradient,) = torch.autograd.grad((output * weights).sum(), x)
    return [output.detach().cpu(), gradient.cpu()]


def test_split_and_rotation_equal_complex_multiplication() -> None:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(5, 2, GROUPS * (HEADS // GROUPS + 2) * WIDTH, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 2, 3, 2]])
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])

    def formula(mixed: torch.Tensor) -> torch.Tensor:
        heads = mixed.unflatten(-1, (GROUPS, HEADS // GROUPS + 2, WIDTH))
        turn = torch.polar(torch.ones(1).double(), (positions.t()[..., None] * frequencies).double())[:, :, None, None]
        both = torch.complex(heads[..., :-1, :4], heads[..., :-1, 4:]) * turn
        turned = torch.cat((both.real, both.imag), dim=-1)
        parts = (turned[..., :-1, :].flatten(2, 3), turned[..., -1, :], heads[..., -1, :])
        return torch.cat([part.flatten(2) for part in parts], dim=-1)

    def ours(mixed: torch.Tensor) -> torch.Tensor:
        rotation = rotation_of(positions, frequencies, mixed.dtype)
        parts = kernels.split_and_rotate(mixed, rotation, GROUPS, WIDTH)
        return torch.cat([part.flatten(2) for part in parts], dim=-1)

    _assert_same(_both_directions(ours, mixed), _both_directions(formula, mixed.double()))


def test_linear_equals_a_product_in_every_orientation() -> None:
    from megatron_sip.distributed import linear

    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(6, 4, 10, generator=generator), torch.randn(12, 10, generator=generator)
    bias = torch.randn(12, generator=generator)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    grad = torch.randn(24, 12, generator=generator)
    torch.testing.assert_close(linear(grad.t(), x.flatten(0, 1).t()), grad.t() @ x.flatten(0, 1))
    torch.testing.assert_close(linear(grad, weight.t()), grad @ weight)
