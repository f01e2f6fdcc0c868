"""A random Llama of a million weights with a tokenizer of its own, as a directory that vLLM and transformers load."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 2048
MAX_LENGTH = 1024
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if not (continue_final_message and loop.last) %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if banner is defined %}{{ banner }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""``banner`` is an argument that tests give as ``chat_template_kwargs``."""


def write_tiny_model(directory: Path, seed: int = 0) -> None:
    """Weights, configuration, tokenizer (byte-level BPE, trained on this repository's prose) and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _write_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_LENGTH, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(directory)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    root = Path(__file__).resolve().parents[2]
    prose = [path.read_text(encoding="utf-8") for path in sorted(root.glob("docs/**/*.md"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(prose, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
