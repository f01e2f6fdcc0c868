"""Tiny random models of transformers with what sets the families apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = "To convert is to copy every number to the place where it means the same. 0123456789 (x, y) -> [z]\n"


def tokenizer_folder(folder: Path) -> int:
    """A byte-level BPE tokenizer with an end-of-text token; returns its number of tokens."""
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=277,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT * 4], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return len(fast)


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Makes, saves (in shards of 100 kB) and returns a model: llama2, llama31, qwen2 or qwen3."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": 283, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, **sizes,
    }  # fmt: skip
    torch.manual_seed(5)
    if kind == "llama2":
        config: Any = transformers.LlamaConfig(**{**common, "num_key_value_heads": 4}, rms_norm_eps=1e-5)
        model: Any = transformers.LlamaForCausalLM(config)
    elif kind == "llama31":
        rope = {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }  # fmt: skip
        config = transformers.LlamaConfig(**common, rope_parameters=rope, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common, tie_word_embeddings=True))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{"head_dim": 16, **common}))
    with torch.no_grad():  # norms of 1 and biases of 0 would hide one that is missing or in the wrong place
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer_folder(folder)
    return model.float()
