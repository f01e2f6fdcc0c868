"""The independent reference: ``transformers.LlamaForCausalLM`` on separate sequences, in float32."""

from __future__ import annotations

from typing import Any

import torch

from tests.model.rows import Rows

VOCAB_SIZE = 61  # padded to 64 or more: there are columns that must stay out
ARCHITECTURE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "max_position_embeddings": 64,
    "use_rope_scaling": True,
    # Short enough that positions of the tests reach the stretched, the blended and the untouched frequencies.
    "rope_scaling_factor": 4.0,
    "rope_original_max_position_embeddings": 32,
    "make_vocab_size_divisible_by": 8,
}


def make_llama(tied: bool = False) -> Any:
    """A random Llama with grouped queries and Llama 3.1's RoPE scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        initializer_range=0.2, attn_implementation="eager",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():  # norms of 1 would hide a norm that is missing or in the wrong place
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def make_qwen() -> Any:
    """A random Qwen 3: a Llama with RMSNorm on the heads of queries and keys, and here with biases on q, k and v."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(12)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        initializer_range=0.2, attention_bias=True, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()  # the policy has none there
            elif "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    return model


def reference_log_probs(model: Any, rows: Rows) -> torch.Tensor:
    """Log-probs [B, L] of every candidate as a sequence of its own with its prefix; 0 on padding."""
    result = torch.zeros_like(rows.coefficients)
    pieces = []
    for row, candidates in enumerate(rows.sequences):
        for number, (prefix, continuation) in enumerate(candidates):
            logits = model(torch.tensor([prefix + continuation])).logits[0]
            scores = logits[len(prefix) - 1 : -1].log_softmax(dim=-1)
            chosen = scores.gather(-1, torch.tensor(continuation)[:, None]).squeeze(-1)
            start = number * rows.layout.candidate_block
            index = (torch.tensor([row]).expand(len(continuation)), torch.arange(start, start + len(continuation)))
            pieces.append((index, chosen))
    for index, chosen in pieces:
        result = result.index_put(index, chosen)
    return result


def reference_gradients(model: Any, batches: list[Rows]) -> dict[str, torch.Tensor]:
    """Gradients, by Llama's names, of the weighted sum of log-probs over all micro-batches."""
    model.zero_grad()
    total = sum((rows.coefficients * reference_log_probs(model, rows)).sum() for rows in batches)
    assert isinstance(total, torch.Tensor)
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients
