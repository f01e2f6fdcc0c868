"""What the ranks of a layout compute; each function returns plain data that the tests compare with the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.model import (
    CausalPlan,
    ModelConfig,
    NextLogits,
    PolicyModel,
    ScoreTargets,
    SharedPrefixPlan,
    build_model,
    without_sequence_parallel,
)
from tests.model.hf_weights import expected_part, load_llama
from tests.model.reference import ARCHITECTURE, VOCAB_SIZE
from tests.model.rows import Rows


def variants(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs every variant of one layout: ``payload["variants"]`` lists (fields of the layout, fields of the model)."""
    context = initialize(ParallelConfig(**payload["sizes"]), seed=5)
    results = []
    for layout, model in payload["variants"]:
        here = replace(context, config=replace(context.config, **layout))
        results.append(_variant(here, ModelConfig(**{**ARCHITECTURE, **model}), payload))
    return results


def _variant(context: ParallelContext, config: ModelConfig, payload: dict[str, Any]) -> dict[str, Any]:
    chunks = build_model(config, VOCAB_SIZE, context)
    probe: Rows = payload["probe"]
    fresh = _next_logits(chunks, context, probe.tokens, probe.positions, probe.layout.length)
    load_llama(chunks, payload["weights"], config.resolve(), context)
    result: dict[str, Any] = {
        "tp_rank": context.tp_rank,
        "last": context.is_last_stage,
        "fresh_logits": fresh,
        "logits": _next_logits(chunks, context, probe.tokens, probe.positions, probe.layout.length),
        "moved_logits": _next_logits(chunks, context, probe.tokens, payload["moved"], probe.layout.length),
        "sequence_parallel": context.config.sequence_parallel,
        "refusal": _refusal_of_odd_rows(chunks[0], probe),
        "shapes": _shapes_at_the_output_layer(chunks, context, probe),
    }
    with without_sequence_parallel(chunks):
        odd = probe.layout.length - 1
        result["odd_logits"] = _next_logits(chunks, context, probe.tokens[:, :odd], probe.positions[:, :odd], odd)
    result["sequence_parallel_again"] = chunks[0].config.sequence_parallel == context.config.sequence_parallel
    for chunk in chunks:
        chunk.train()
    result["log_probs"] = _train(chunks, context, payload["batches"])
    result["gradient_errors"] = _gradient_errors(chunks, context, config, payload["gradients"])
    return result


def _run(chunks: list[PolicyModel], batches: list[Any], step: Any, rows: int, length: int, forward_only: bool) -> Any:
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _next_logits(
    chunks: list[PolicyModel], context: ParallelContext, tokens: torch.Tensor, positions: torch.Tensor, length: int
) -> Any:
    """Logits [B, S, V / tp] of a causal pass on the last stage, None elsewhere."""
    sources = torch.arange(length).expand(tokens.shape[0], length)

    def step(iterator: Any, chunk: PolicyModel) -> Any:
        next(iterator)
        return chunk(tokens, positions, CausalPlan(), NextLogits(sources)), lambda x, non_loss_data: x

    # Two of them, for the interleaved schedule wants a multiple of the pipeline's size.
    with torch.no_grad():
        outputs = _run(chunks, [0, 0], step, tokens.shape[0], length, forward_only=True)
    return outputs[0].detach().clone().numpy() if context.is_last_stage else None


def _train(chunks: list[PolicyModel], context: ParallelContext, batches: list[Rows]) -> Any:
    """Log-probs of every micro-batch, after a forward and backward of the weighted sums through Megatron's schedule."""
    kept: list[Any] = []

    def loss(rows: Rows, log_probs: torch.Tensor) -> Any:
        kept.append(log_probs.detach().clone().numpy())
        return (rows.coefficients * log_probs).sum(), torch.tensor(1), {}

    def step(iterator: Any, chunk: PolicyModel) -> Any:
        rows: Rows = next(iterator)
        plan = SharedPrefixPlan(rows.layout, rows.prefix_lengths)
        output = chunk(rows.tokens, rows.positions, plan, ScoreTargets(rows.targets, rows.sources))
        return output, partial(loss, rows)

    longest = max(rows.layout.length for rows in batches)
    _run(chunks, batches, step, batches[0].tokens.shape[0], longest, forward_only=False)
    return kept


def _gradient_errors(
    chunks: list[PolicyModel], context: ParallelContext, config: ModelConfig, gradients: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Largest difference to the reference's gradient, relative to its largest entry, by (stage and) parameter."""
    errors = {}
    for stage, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            assert parameter.grad is not None, name
            gradient = parameter.grad.clone()
            of_heads = "q_layernorm" in name or "k_layernorm" in name
            if getattr(parameter, "sequence_parallel", False) or of_heads:  # as Megatron's finalization does
                dist.all_reduce(gradient, group=context.tp_group)
            expected = expected_part(name, chunk, gradients, config.resolve(), context)
            real, padding = gradient[: expected.shape[0]], gradient[expected.shape[0] :]
            errors[f"{stage}.{name}"] = float((real - expected).abs().max() / expected.abs().max())
            if padding.numel():
                errors[f"{stage}.{name} (padding)"] = float(padding.abs().max())
    return errors


def _refusal_of_odd_rows(chunk: PolicyModel, probe: Rows) -> str:
    if not chunk.config.sequence_parallel:
        return ""
    odd = probe.layout.length - 1
    try:
        chunk(probe.tokens[:, :odd], probe.positions[:, :odd], CausalPlan(), None)
    except ValueError as error:
        return str(error)
    return "accepted"


def _shapes_at_the_output_layer(chunks: list[PolicyModel], context: ParallelContext, probe: Rows) -> Any:
    """Shape that enters the output layer when three positions of each row are asked for."""
    if not context.is_last_stage or context.pp_size > 1:
        return None
    shapes = []
    chunk = chunks[0]
    handle = chunk.output_layer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        sources = torch.tensor([[3, 1, 3]]).expand(probe.tokens.shape[0], 3)
        chunk(probe.tokens, probe.positions, CausalPlan(), NextLogits(sources))
    handle.remove()
    return shapes[0]


def first_logits(tokens: torch.Tensor) -> list[list[float]]:
    """Logits of a fresh model for the first four positions of the first row, with another padding of the vocabulary."""
    context = initialize(ParallelConfig(), seed=5)
    chunk = build_model(ModelConfig(**{**ARCHITECTURE, "make_vocab_size_divisible_by": 100}), VOCAB_SIZE, context)[0]
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        logits = chunk(tokens[:1], positions, CausalPlan(), NextLogits(torch.arange(4)[None]))
    assert logits.shape == (1, 4, 100)
    result: list[list[float]] = logits[0, :, :VOCAB_SIZE].tolist()
    return result


def bfloat16_claims(payload: dict[str, Any]) -> dict[str, Any]:
    """Types inside a bfloat16 model of two pipeline stages."""
    context = initialize(ParallelConfig(pipeline_model_parallel_size=2), seed=5)
    config = ModelConfig(**ARCHITECTURE, bf16=True)
    chunk = build_model(config, VOCAB_SIZE, context)[0]
    load_llama([chunk], payload["weights"], config.resolve(), context)
    rows: Rows = payload["rows"]
    seen: dict[str, str] = {}
    handle = chunk.register_forward_hook(lambda module, inputs, output: seen.update(output=str(output.dtype)))
    log_probs = _train([chunk], context, [rows])
    handle.remove()
    return {
        "parameters": sorted({str(parameter.dtype) for parameter in chunk.parameters()}),
        "frequencies": str(chunk.rotary_frequencies.dtype),
        "output": seen["output"],
        "log_probs": log_probs,
    }


def vocab_parallel_claims(payload: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of given whole logits, of which this rank holds its columns."""
    context = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    from megatron_sip.model import vocab_parallel_log_probs

    logits = payload["logits"].chunk(2, dim=-1)[context.tp_rank].clone().requires_grad_()
    before = logits.detach().clone()
    scores = vocab_parallel_log_probs(logits, payload["targets"], payload["vocab_size"], context.tp_group)
    loss = (scores * payload["coefficients"]).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits)[0]
    return {
        "scores": scores.detach().numpy(),
        "gradient": first.numpy(),
        "twice_the_same": torch.equal(first, second),
        "logits_untouched": torch.equal(before, logits),
    }


def tiled_output_layer_claims(payload: dict[str, Any]) -> dict[str, Any]:
    """Log-probs and gradients on one rank (of a GPU, where there is one), its blocks of three positions in tiles."""
    context = initialize(ParallelConfig(), seed=0)
    payload = {k: v.to(context.device) if isinstance(v, torch.Tensor) else v for k, v in payload.items()}
    from megatron_sip.model import output_layer

    output_layer._MIN_ROWS, output_layer._STEP, output_layer._TILE_LOGITS = 3, 1, payload["tile_logits"]
    row_bytes = payload["weight"].shape[0] * payload["weight"].element_size()
    output_layer._SIZES[context.device.type] = output_layer._Sizes(8, 3 * row_bytes, 3 * row_bytes, 12)
    results: dict[str, Any] = {}
    for known in (False, True):
        hidden, weight = (payload[name].clone().requires_grad_() for name in ("hidden", "weight"))
        weight.main_grad = torch.zeros(weight.shape, device=context.device)
        scores = output_layer.target_log_probs(
            hidden, weight, payload["targets"], payload["vocab_size"], context.tp_group,
            payload["coefficients"] if known else None,
        )  # fmt: skip
        (scores * payload["coefficients"]).sum().backward()
        results[f"known {known}"] = {
            "scores": scores.detach().cpu().numpy(),
            "hidden": hidden.grad.float().cpu().numpy(),
            "weight": weight.main_grad.cpu().numpy(),
        }
    return results


def output_layer_claims(payload: dict[str, Any]) -> dict[str, Any]:
    """Log-probs from hidden states and this rank's rows of a weight, in blocks of two positions, every way."""
    context = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    from megatron_sip.model import output_layer

    output_layer._MIN_ROWS, output_layer._STEP = 2, 1
    output_layer._SIZES["cpu"] = output_layer._Sizes(8, 64, 64, 12)
    results: dict[str, Any] = {}
    for known in (False, True):
        for buffered in (False, True):
            hidden = payload["hidden"].clone().requires_grad_()
            weight = torch.nn.Parameter(payload["weight"].chunk(2)[context.tp_rank].clone())
            if buffered:
                weight.main_grad = torch.ones_like(weight)
            scores = output_layer.target_log_probs(
                hidden, weight, payload["targets"], payload["vocab_size"], context.tp_group,
                payload["coefficients"] if known else None,
            )  # fmt: skip
            (scores * payload["coefficients"]).sum().backward()
            gradient = weight.main_grad - 1 if buffered else weight.grad
            results[f"known {known}, buffered {buffered}"] = {
                "scores": scores.detach().numpy(),
                "hidden": hidden.grad.numpy(),
                "weight": gradient.numpy(),
                "flag": getattr(weight, "grad_added_to_main_grad", False) == buffered,
            }
    hidden = payload["hidden"].clone().requires_grad_()
    weight = payload["weight"].chunk(2)[context.tp_rank]
    scores = output_layer.target_log_probs(
        hidden, weight, payload["targets"], payload["vocab_size"], context.tp_group, payload["coefficients"]
    )
    try:
        (scores * payload["coefficients"] * 1.5).sum().backward()
        results["refusal"] = ""
    except RuntimeError as error:
        results["refusal"] = str(error)
    return results
