"""A layer's element-wise parts with backward passes of their own: few passes over memory, on any device.

Autograd's versions of RMSNorm, SwiGLU and RoPE write each intermediate value out and read it back; on CPU they took a
third of a training step. On CUDA SwiGLU and RoPE are compiled into one kernel each way, where there is a compiler.

    s, b  sequence and batch    H  hidden size    F  width of the MLP    h, g, d  heads, key-value groups, head width
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from megatron_sip.model.rope import Rotation


def rms_norm(inputs: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """inputs [..., H], weight [H] -> [..., H]; the mean square is taken in float32 (Zhang and Sennrich 2019)."""
    if inputs.device.type != "cpu":
        return F.rms_norm(inputs, weight.shape, weight, eps)  # one kernel there
    result: torch.Tensor = _RMSNorm.apply(inputs, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norms = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norms.square_().div_(inputs.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(inputs, weight, inverse)
        return (inputs * inverse).mul_(weight).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        inputs, weight, inverse = ctx.saved_tensors
        width = inputs.shape[-1]
        grad, x = (tensor.reshape(-1, width).float() for tensor in (grad_outputs[0], inputs))
        inverse = inverse.reshape(-1)
        products = grad * x
        scale = weight.float()
        grad_weight = torch.mv(products.t(), inverse)
        # d/dx of x / rms(x): what lies along x is taken out.
        along = torch.mv(products, scale).mul_(inverse.pow(3)).div_(width)
        grad_inputs = torch.mul(grad, scale, out=products).mul_(inverse.unsqueeze(1))
        grad_inputs.addcmul_(x, along.unsqueeze(1), value=-1)
        return grad_inputs.view(inputs.shape).to(inputs.dtype), grad_weight.to(weight.dtype), None


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 F], the gate first -> silu(gate) * up [..., F] (Shazeer 2020)."""
    result: torch.Tensor = _SwiGLU.apply(gate_and_up)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        if _is_compiled(gate_and_up):
            return _compiled(fused_swiglu)(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (gate_and_up,) = ctx.saved_tensors
        grad = grad_outputs[0]
        if _is_compiled(gate_and_up):
            return _compiled(fused_swiglu_backward)(grad, gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def rotate(inputs: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """[s, b, n, d] turned by its positions' angles, the first half of d against the second (Su et al. 2021)."""
    result: torch.Tensor = _Rotate.apply(inputs, rotation)
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        ctx.rotation = rotation
        return _turn(inputs, rotation, torch.empty_like(inputs, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad_outputs[0]
        return _turn(grad, ctx.rotation, torch.empty_like(grad), back=True), None


def split_and_rotate(
    mixed: torch.Tensor, rotation: Rotation, num_groups: int, head_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Megatron's mixed projection [s, b, g * (h / g + 2) * d] -> turned query [s, b, h, d], turned key and value
    [s, b, g, d]. Per group the projection holds its query heads, its key and its value."""
    return _SplitAndRotate.apply(mixed, rotation, num_groups, head_width)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, rotation: Rotation, num_groups: int, head_width: int
    ) -> tuple[torch.Tensor, ...]:
        heads = mixed.unflatten(-1, (num_groups, -1, head_width))  # [s, b, g, h / g + 2, d]
        ctx.rotation, ctx.shape = rotation, heads.shape
        if _is_compiled(mixed):
            return _compiled(fused_split_and_turn)(heads, rotation.cosines, rotation.sines)
        queries, keys, values = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
        turned = _turn(queries, _for_groups(rotation), queries.new_empty(queries.shape))
        return turned.flatten(2, 3), _turn(keys, rotation, keys.new_empty(keys.shape)), values.contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        queries, keys, values = grad_outputs
        if _is_compiled(queries):
            joined = _compiled(fused_turn_back_and_join)(
                queries, keys, values, ctx.rotation.cosines, ctx.rotation.sines
            )
            return joined, None, None, None
        grad = queries.new_empty(ctx.shape)
        queries = queries.unflatten(2, (ctx.shape[2], -1))
        _turn(queries, _for_groups(ctx.rotation), grad[..., :-2, :], back=True)
        _turn(keys, ctx.rotation, grad[..., -2, :], back=True)
        grad[..., -1, :].copy_(values)
        return grad.flatten(2), None, None, None


def _for_groups(rotation: Rotation) -> Rotation:
    return Rotation(rotation.cosines.unsqueeze(2), rotation.sines.unsqueeze(2))


def _turn(inputs: torch.Tensor, rotation: Rotation, out: torch.Tensor, back: bool = False) -> torch.Tensor:
    half = inputs.shape[-1] // 2
    first, second = inputs[..., :half], inputs[..., half:]
    sign = 1.0 if back else -1.0
    torch.mul(first, rotation.cosines, out=out[..., :half]).addcmul_(second, rotation.sines, value=sign)
    torch.mul(second, rotation.cosines, out=out[..., half:]).addcmul_(first, rotation.sines, value=-sign)
    return out


def _is_compiled(inputs: torch.Tensor) -> bool:
    # Not one position at a time: what decodes is captured in a graph, and costs its launches and not its memory.
    return inputs.device.type == "cuda" and inputs.shape[0] > 1 and _can_compile()


@cache
def _can_compile() -> bool:
    """Whether torch.compile can make kernels for CUDA: it needs Triton, and that a C compiler."""
    return find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang")))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)  # once for all widths of rows


def fused_swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 F] -> [..., F], as ``swiglu``; one pass over memory if compiled."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def fused_swiglu_backward(grad: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    """Gradient [..., F] -> [..., 2 F], likewise."""
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    share, wide = gate.sigmoid(), grad.float()
    grad_gate = wide * up * share * (1 + gate * (1 - share))
    return torch.cat((grad_gate, wide * gate * share), dim=-1).to(grad.dtype)


def fused_split_and_turn(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[s, b, g, h / g + 2, d] -> query [s, b, h, d], key and value [s, b, g, d], as ``split_and_rotate``."""
    queries = _turned(heads[..., :-2, :], cosines.unsqueeze(2), sines.unsqueeze(2)).flatten(2, 3)
    return queries, _turned(heads[..., -2, :], cosines, sines), heads[..., -1, :].contiguous()


def fused_turn_back_and_join(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> torch.Tensor:
    """Its gradients -> that of the mixed projection, [s, b, g * (h / g + 2) * d]."""
    turned = _turned(queries, cosines, -sines).unflatten(2, (keys.shape[2], -1))
    others = torch.stack((_turned(keys, cosines, -sines), values), dim=3)
    return torch.cat((turned, others), dim=3).flatten(2)


def _turned(inputs: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = inputs.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
