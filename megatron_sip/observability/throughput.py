"""Tokens per second, and what part of the hardware's peak they use."""

from __future__ import annotations


def training_flops_per_token(num_parameters: int, num_layers: int, hidden_size: int, context: float) -> float:
    """Floating-point operations of forward and backward per token: 6 N + 12 L h c.

    ``num_parameters`` counts what multiplies a token (the embedding table does not, the output layer does); ``context``
    is the number of positions that a token attends to as if attention were not causal (PaLM, appendix B).
    """
    return 6.0 * num_parameters + 12.0 * num_layers * hidden_size * context


def throughput_scalars(
    num_tokens: int, seconds: float, flops_per_token: float, num_devices: int, peak_tflops: float | None
) -> dict[str, float]:
    """``tokens_per_s`` of all devices, ``throughput`` in TFLOP/s per device (Megatron's name), and ``mfu`` if the peak
    of a device is known. ``num_tokens`` counts those that went through forward and backward in ``seconds``."""
    if seconds <= 0:
        raise ValueError(f"{seconds} s is no duration: measure a step that has ended")
    tokens_per_s = num_tokens / seconds
    tflops = tokens_per_s * flops_per_token / num_devices / 1e12
    scalars = {"tokens_per_s": tokens_per_s, "throughput": tflops}
    if peak_tflops is not None:
        scalars["mfu"] = tflops / peak_tflops
    return scalars
