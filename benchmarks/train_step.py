#!/usr/bin/env python
"""A next-token training step (forward, backward, clipping, AdamW) beside transformers' and plain Megatron-Core's.

All sides start from the same weights and take the same tokens; the losses of their first steps are printed beside each
other. Ours is ``Engine`` with everything a run has (gradient buffers, distributed optimizer, float32 main weights).

    transformers        LlamaForCausalLM with SDPA, fused AdamW; bf16 by autocast on float32 weights (its Trainer's)
    transformers-bf16   the same with weights in bfloat16: less exact than ours, which keeps float32 main weights
    megatron            Megatron-Core's GPTModel by its local layer spec, its attention, cross-entropy and optimizer,
                        on our CPU platform but without our layers, products, output layer and fused kernels
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.pairs import CLOCKS, Step, compare, machine, report

SIDES = {
    "transformers": "benchmarks.train_step:theirs_transformers",
    "transformers-bf16": "benchmarks.train_step:theirs_pure_bf16",
    "megatron": "benchmarks.train_step:theirs_megatron",
}
LEARNING_RATE = 1e-4


def architecture(payload: dict[str, Any]) -> dict[str, Any]:
    """Options of our ModelConfig."""
    hidden = payload["hidden"]
    return {
        "num_layers": payload["layers"],
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "num_query_groups": hidden // 64,
        "ffn_hidden_size": 64 * round(hidden * 8 / 3 / 64),
        "kv_channels": 64,
        "max_position_embeddings": payload["sequence_length"],
        "untie_embeddings_and_output_weights": True,
    }


def _tokens(payload: dict[str, Any]) -> torch.Tensor:
    """int64 [B, S + 1]."""
    generator = torch.Generator().manual_seed(7)
    shape = (payload["rows"], payload["sequence_length"] + 1)
    return torch.randint(0, payload["vocab_size"], shape, generator=generator)


def initial_weights(payload: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What all sides start from, by Llama's names."""
    weights: dict[str, torch.Tensor] = llama(payload).state_dict()
    return weights


def llama(payload: dict[str, Any]) -> Any:
    """transformers' model with the initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    a = architecture(payload)
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=payload["vocab_size"],
            hidden_size=a["hidden_size"],
            intermediate_size=a["ffn_hidden_size"],
            num_hidden_layers=a["num_layers"],
            num_attention_heads=a["num_attention_heads"],
            num_key_value_heads=a["num_query_groups"],
            max_position_embeddings=a["max_position_embeddings"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def _transformers_step(payload: dict[str, Any], model: Any, autocast: bool) -> Step:
    tokens = _tokens(payload)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model.train()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return round(float(loss.detach()), 4)

    return step


def theirs_transformers(payload: dict[str, Any]) -> Step:
    """See the module."""
    return _transformers_step(payload, llama(payload), autocast=payload["bf16"])


def theirs_pure_bf16(payload: dict[str, Any]) -> Step:
    """See the module."""
    return _transformers_step(payload, llama(payload).to(torch.bfloat16), autocast=False)


def ours(payload: dict[str, Any]) -> Step:
    """See the module."""
    from megatron_sip.data.batches import next_token_batches
    from megatron_sip.data.samples import Window
    from megatron_sip.distributed import ParallelConfig, initialize
    from megatron_sip.engine.config import EngineConfig
    from megatron_sip.engine.engine import Engine
    from megatron_sip.model import ModelConfig, build_model
    from megatron_sip.objectives import NextToken, ObjectiveConfig
    from megatron_sip.types import TrainPass
    from tests.model.hf_weights import load_llama

    context = initialize(ParallelConfig(), seed=1)
    config = ModelConfig(**architecture(payload), bf16=payload["bf16"])
    chunks = build_model(config, payload["vocab_size"], context)
    load_llama(chunks, initial_weights(payload), config.resolve(), context)
    engine = Engine(
        chunks,
        EngineConfig(lr=LEARNING_RATE, lr_decay_style="constant", weight_decay=0.1, adam_beta2=0.95),
        ObjectiveConfig(reference_policy="none"),
        context,
        train_iters=100,
    )
    windows = [Window(index, row.numpy()) for index, row in enumerate(_tokens(payload))]
    objective = NextToken()

    def step() -> float:
        batches = next_token_batches(windows, payload["rows"])
        units = sum(objective.units(batch) for batch in batches)
        engine.begin_step()
        engine.run(TrainPass("ntp", batches, objective, 1.0 / units), last=True)
        total, count = engine.collect_metrics()["lm loss"]
        engine.optimizer_step()
        return round(total / count, 4)

    return step


def theirs_megatron(payload: dict[str, Any]) -> Step:
    """See the module."""
    from benchmarks.plain_megatron import plain_megatron_step

    return plain_megatron_step(payload, architecture(payload), _tokens(payload), LEARNING_RATE)


def main() -> None:
    """Measures every combination of the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=tuple(SIDES), nargs="+", default=["transformers"])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2, help="sequences of a step, in one micro-batch")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    print(f"{machine()}\n{options.layers} layers, {options.rows} x {options.sequence_length} tokens, "
          f"vocabulary {options.vocab_size}", flush=True)  # fmt: skip
    rows = []
    for hidden in options.hidden:
        for precision in options.precision:
            for against in options.against:
                payload = {**vars(options), "hidden": hidden, "bf16": precision == "bf16"}
                found = compare(
                    f"hidden {hidden}, {precision}",
                    ("megatron_sip", "benchmarks.train_step:ours"),
                    (against, SIDES[against]),
                    payload,
                    options.pairs,
                    num_warm_up=2,
                    tokens=options.rows * options.sequence_length,
                    clock=options.clock,
                )
                print(found.line(), flush=True)
                rows.append(found.row())
                report(options.json, rows, vars(options))


if __name__ == "__main__":
    main()
