"""The small model and the settings that the engine's tests share."""

from __future__ import annotations

from typing import Any

PAYLOAD: dict[str, Any] = {
    "seed": 3,
    "steps": 5,
    "lr": 1e-2,
    "micro_batch_size": 1,
    "weights": {"lm loss": 1.0, "loss/rf_nll": 0.5, "loss/dpo": 2.0},
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "untie_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 16,
        "init_method_std": 0.1,
    },
}
