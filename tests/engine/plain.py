"""The same training in plain PyTorch: transformers' Llama, whole sequences, hand-written losses, ``torch.optim.AdamW``.

Runs on one rank, since the initial weights come from our model (by name).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from megatron_sip.distributed import ParallelConfig, initialize
from megatron_sip.model import ModelConfig, build_model
from tests.engine.rows import NTP_LAYOUT, PAIR_LAYOUT, SUFFIX_LAYOUT, VOCAB, Row, draw_rows


def train_plain(payload: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradient norms and the parameter norm of ``payload["steps"]`` steps."""
    settings = ModelConfig(**payload["model"])
    context = initialize(ParallelConfig(), seed=payload["seed"])
    (chunk,) = build_model(settings, VOCAB, context)
    policy = llama(settings, dict(chunk.named_parameters()))
    reference = copy.deepcopy(policy).requires_grad_(False)
    decayed = [p for p in policy.parameters() if p.dim() > 1]
    others = [p for p in policy.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    history = []
    for step in range(payload["steps"]):
        losses = {
            "lm loss": _next_token(policy, draw_rows(step, NTP_LAYOUT)),
            "loss/dpo": _dpo(policy, reference, draw_rows(step, PAIR_LAYOUT), beta=0.5),
        }
        if rows := draw_rows(step, SUFFIX_LAYOUT):
            losses["loss/rf_nll"] = _suffix(policy, rows)
        optimizer.zero_grad()
        torch.stack([payload["weights"][name] * loss for name, loss in losses.items()]).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = payload["lr"] * min(1.0, step / 2)  # two steps of linear warm-up, then constant
        optimizer.step()
        history.append({**{name: float(loss) for name, loss in losses.items()}, "grad-norm": float(norm)})
    squares = sum(float(p.detach().double().pow(2).sum()) for p in policy.parameters())
    return {"history": history, "params-norm": squares**0.5}


def llama(settings: ModelConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' model with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    a = settings.resolve()
    tied = not a.untie_embeddings_and_output_weights
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=a.hidden_size,
            intermediate_size=a.ffn_hidden_size,
            num_hidden_layers=a.num_layers,
            num_attention_heads=a.num_attention_heads,
            num_key_value_heads=a.num_query_groups,
            head_dim=a.kv_channels,
            rms_norm_eps=a.norm_epsilon,
            rope_theta=a.rotary_base,
            max_position_embeddings=a.max_position_embeddings,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCAB],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else weights["output_layer.weight"][:VOCAB]
    for number in range(a.num_layers):
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"]
        grouped = qkv.view(a.num_query_groups, -1, a.kv_channels, a.hidden_size)
        query, key, value = grouped.split([grouped.shape[1] - 2, 1, 1], dim=1)
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        state |= {
            theirs + "self_attn.q_proj.weight": query.reshape(-1, a.hidden_size),
            theirs + "self_attn.k_proj.weight": key.reshape(-1, a.hidden_size),
            theirs + "self_attn.v_proj.weight": value.reshape(-1, a.hidden_size),
            theirs + "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
            theirs + "input_layernorm.weight": weights[ours + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "pre_mlp_layernorm.weight"],
        }
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, strict=True)
    return model


def _log_probs(model: torch.nn.Module, prefix: list[int], continuation: list[int]) -> torch.Tensor:
    tokens = torch.tensor([prefix + continuation])
    scores = model(tokens).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
    return scores.gather(1, torch.tensor(continuation).unsqueeze(1)).squeeze(1)


def _next_token(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    return -torch.cat([_log_probs(model, row.prefix[:1], row.prefix[1:]) for row in rows]).mean()


def _suffix(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    return -torch.cat([_log_probs(model, row.prefix, row.continuations[0]) for row in rows]).mean()


def _dpo(model: torch.nn.Module, reference: torch.nn.Module, rows: list[Row], beta: float) -> torch.Tensor:
    losses = []
    for row in rows:
        if row.weight:
            chosen, rejected = (
                _log_probs(model, row.prefix, y).sum() - _log_probs(reference, row.prefix, y).sum()
                for y in row.continuations
            )
            losses.append(-torch.nn.functional.logsigmoid(beta * (chosen - rejected)))
    return torch.stack(losses).mean()
