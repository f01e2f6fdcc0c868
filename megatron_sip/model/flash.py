"""Attention kernels that also give, and take back, the logarithm of the softmax's denominator.

With it attention over several sets of keys is put together from one call per set, in both directions: forward the
parts are weighed by their shares of the joint denominator, backward each call is given the joint output and
denominator, from which a kernel computes the gradient of just its keys (Dao et al. 2022, algorithm 4, needs no more).

The choice of kernels, in this one place:
    CPU              torch's blockwise kernel, any head width, key-value heads shared.
    CUDA, 16 bit     FlashAttention 2: key-value heads shared, no mask, head width up to 256 in multiples of 8.
    CUDA, float32    the memory-efficient kernel: FlashAttention has no float32; heads are repeated for it.
None writes out a score matrix. FlexAttention would do it in one call of a mask, but needs a compiler, compiles anew for
new widths, and visits every block of a mask that is mostly whole blocks: here the sets of keys are known beforehand.

    b rows, h query heads, g key-value heads, q queries, k keys, d head width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_aten = torch.ops.aten
Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [b, h, q, d], key and value [b, g, k, d] -> output [b, h, q, d], log of the denominator float32 [b, h, q].

    ``causal`` takes q = k.
    """
    if query.device.type == "cpu":
        output, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
        return output, log_sum
    return _attend_on_cuda(query, key, value, causal=causal)


def attend_backward(
    log_sum: torch.Tensor,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    causal: bool,
) -> Tensors3:
    """Gradients of query, key and value. ``grad``, ``output`` [b, h, q, d] and ``log_sum`` [b, h, q] may be those of
    attention over more keys than ``key``."""
    if query.device.type == "cpu":
        grads: Tensors3 = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, log_sum, 0.0, causal
        )
        return grads
    return _attend_backward_on_cuda(log_sum, grad, query, key, value, output, causal=causal)


def _attend_on_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width, scale = query.shape[-1], query.shape[-1] ** -0.5
    query, key, value = (_pad_width(x) for x in (query, key, value))
    if query.dtype == torch.float32:
        key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
        output, log_sum = _aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )[:2]
        return output[..., :width], log_sum[..., : query.shape[2]]  # it rounds q up to 32
    output, log_sum = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]
    return output[..., :width], log_sum


def _attend_backward_on_cuda(
    log_sum: torch.Tensor,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    causal: bool,
) -> Tensors3:
    width, scale = query.shape[-1], query.shape[-1] ** -0.5
    num_queries, num_keys, num_groups = query.shape[2], key.shape[2], key.shape[1]
    grad, query, key, value, output = (_pad_width(x) for x in (grad, query, key, value, output))
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # state of dropout, which there is none of
    if query.dtype == torch.float32:
        key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
        log_sum = F.pad(log_sum, (0, -num_queries % 32), value=torch.inf)
        grad_query, grad_key, grad_value, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, output, log_sum, unused, unused, 0.0, [True, True, True, False], causal,
            scale=scale,
        )  # fmt: skip
        grad_key, grad_value = (x.unflatten(1, (num_groups, -1)).sum(dim=2) for x in (grad_key, grad_value))
    else:
        grad_query, grad_key, grad_value = _aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, output, log_sum.contiguous(), None, None, num_queries, num_keys, 0.0, causal,
            unused, unused, scale=scale,
        )  # fmt: skip
    return grad_query[..., :width], grad_key[..., :width], grad_value[..., :width]


def _pad_width(x: torch.Tensor) -> torch.Tensor:
    """Zeros up to the next multiple of 8 change no score."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[b, g, k, d] -> [b, h, k, d]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
