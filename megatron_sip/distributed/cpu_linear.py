"""Matrix products on CPU through oneDNN, Megatron-Core's linear layers made of them, and its embedding's look-up.

torch multiplies float32 matrices on CPU through MKL, which on AMD processors leaves the AVX-512 units idle: on the
machine of docs/results/performance.md oneDNN is 2.0 to 2.9 times as fast, in the same precision. bfloat16 goes through
oneDNN anyway.

    n rows (positions), i inputs, o outputs of a linear layer
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_sip.distributed.main_grad import mark_as_added

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """inputs [..., i] times weight [o, i] transposed (+ bias [o]) -> [..., o], on any device; both may be transposed
    views. Not differentiable where it takes oneDNN: for use inside autograd functions and without gradients. Without a
    bias and where ``writes_into`` says so, the result is written to ``out``."""
    if out is not None:
        return torch.mm(inputs, weight.t(), out=out)
    if not writes_into(inputs, weight) and inputs.numel() and weight.numel():  # it refuses empty ones
        rows = torch.ops.mkldnn._linear_pointwise(inputs.flatten(0, -2), weight, bias, "none", [], "")
        # The operator itself gives a view for more than two dimensions, and what an autograd function returns as a view
        # may not be changed in place, as Megatron-Core's cross-entropy changes its logits.
        result: torch.Tensor = torch.ops.aten._unsafe_view(rows, (*inputs.shape[:-1], weight.shape[0]))
        return result
    return F.linear(inputs, weight, bias)


def writes_into(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``linear`` of matrices can write to memory it is given; oneDNN's operator for float32 cannot."""
    on_cpu = inputs.device.type == "cpu" and inputs.dtype == weight.dtype == torch.float32
    return not (_HAS_ONEDNN and on_cpu)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.has_bias = bias is not None
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        rows = grad.flatten(0, -2)  # [n, o]
        grad_inputs = linear(grad, weight.t())
        grad_weight = linear(rows.t(), inputs.flatten(0, -2).t())
        return grad_inputs, grad_weight, rows.sum(dim=0) if ctx.has_bias else None


def linear_for_megatron(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[torch.Tensor] | None = None,
    wgrad_deferral_limit: int | None = 0,
    tp_group: dist.ProcessGroup | None = None,
    **unused: object,
) -> torch.Tensor:
    """Stand-in for ``linear_with_grad_accumulation_and_async_allreduce``, which has nothing to overlap on a CPU.

    The gathered sequence is kept for the backward pass, where Megatron's gathers it again.
    """
    from megatron.core.tensor_parallel import mappings

    assert not gradient_accumulation_fusion and grad_output_buffer is None, "these need a GPU's kernels"
    if sequence_parallel:
        input = mappings.gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = mappings.copy_to_tensor_model_parallel_region(input, group=tp_group)
    result: torch.Tensor = _Linear.apply(input, weight, bias)
    return result


def look_up(indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Stand-in for ``F.embedding``: int64 [...] and [v, H] -> [..., H].

    torch's gives the whole weight a gradient, mostly zeros, which is then added to all of ``main_grad``: here only the
    rows looked up are touched, in float32, as Megatron's fused accumulation does it for products.
    """
    result: torch.Tensor = _LookUp.apply(indices, weight)
    return result


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices, weight)
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        indices, weight = ctx.saved_tensors
        rows = grad_outputs[0].flatten(0, -2)
        main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)
        if main_grad is None:
            return None, torch.zeros_like(weight).index_add_(0, indices.flatten(), rows)
        main_grad.index_add_(0, indices.flatten(), rows.to(main_grad.dtype))
        if getattr(weight, "zero_out_wgrad", False):
            return None, torch.zeros_like(weight)  # the output layer of this stage gives autograd the same weight's
        mark_as_added(weight)
        return None, None
