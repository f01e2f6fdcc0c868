"""Weights whose gradient goes straight into Megatron's ``main_grad``, past autograd."""

from __future__ import annotations

import torch


def mark_as_added(weight: torch.Tensor) -> None:
    """To be called in the backward pass that added to ``weight.main_grad`` and that gives autograd no gradient of it.

    As after Megatron's fused accumulation DDP's hook must not add anything more; with overlapped reductions it asks for
    a gradient all the same. Megatron gives it one of the weight's size that nobody reads, this is a single number.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    weight.grad = weight.new_zeros(()).expand(weight.shape)
