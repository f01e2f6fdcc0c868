"""Compares the logits of a Megatron checkpoint with those of transformers on real text, both in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sip.checkpoint.config import CheckpointConfig
from megatron_sip.checkpoint.identity import identity_of
from megatron_sip.checkpoint.manager import CheckpointManager
from megatron_sip.distributed import ParallelConfig, initialize
from megatron_sip.errors import CheckpointError
from megatron_sip.huggingface.config_json import CONFIG, architecture_of, read_config, recipe_of
from megatron_sip.huggingface.vocabulary import has_tokenizer, read_vocabulary
from megatron_sip.model import CausalPlan, ModelConfig, NextLogits, build_model

TOLERANCE = 1e-4
"""Of a logit, relative to the largest; float32 sums in another order differ by about 1e-6."""


@dataclass(frozen=True)
class Comparison:
    """How far the two are apart."""

    num_tokens: int
    largest: float
    """Largest absolute logit of transformers'."""
    difference: float
    """Largest absolute difference."""
    num_same_best: int
    """Positions whose most likely token is the same."""

    def __str__(self) -> str:
        return (
            f"verified on {self.num_tokens} tokens: largest difference of a logit {self.difference:.2e}, largest logit "
            f"{self.largest:.2f}, same best token at {self.num_same_best} of {self.num_tokens} positions"
        )


def verify(model: Path, checkpoint: Path, text: str, max_tokens: int = 512, step: int | None = None) -> Comparison:
    """Runs both on ``text`` (without a tokenizer: on its bytes), one after the other; needs the memory for one model.

    Starts this process's own process group: to be called once, and not under torchrun.

    Raises:
        CheckpointError: the logits differ, or there is no text.
    """
    config = read_config(model)
    longest = min(max_tokens, architecture_of(config, model / CONFIG).max_position_embeddings)
    tokens = _tokens(model, text, int(config["vocab_size"]))[:longest]
    if not tokens:
        raise CheckpointError(
            "the text to compare logits on is empty: name another with --verify; nothing was written."
        )
    theirs = _transformers_logits(model, tokens)
    ours = _our_logits(model, config, checkpoint, step, tokens)
    theirs = theirs[:, : ours.shape[1]]
    best = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    found = Comparison(len(tokens), float(theirs.abs().max()), float((ours - theirs).abs().max()), int(best))
    if not found.difference <= TOLERANCE * max(1.0, found.largest):  # a NaN fails too
        raise CheckpointError(f"the conversion is wrong: {found}; nothing was written.")
    return found


def _tokens(model: Path, text: str, vocab_size: int) -> list[int]:
    if not has_tokenizer(model):
        return [byte % vocab_size for byte in text.encode()]
    import transformers

    ids: list[int] = transformers.AutoTokenizer.from_pretrained(str(model))(text).input_ids
    return ids


def _transformers_logits(model: Path, tokens: Sequence[int]) -> torch.Tensor:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = network(torch.tensor([list(tokens)])).logits[0].float()
    return logits


def _our_logits(
    model: Path, config: Mapping[str, Any], checkpoint: Path, step: int | None, tokens: Sequence[int]
) -> torch.Tensor:
    architecture = architecture_of(config, model / CONFIG)
    vocabulary = read_vocabulary(model, int(config["vocab_size"]))
    context = initialize(ParallelConfig(), seed=0)
    try:
        chunks = build_model(ModelConfig(**recipe_of(architecture)), vocabulary.size, context)
        identity = identity_of(architecture, vocabulary.size, vocabulary.fingerprint)
        options = CheckpointConfig(load=str(checkpoint), ckpt_step=step, finetune=True)

        def build_state(*, is_loading: bool, with_optimizer: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
            return {"model": chunks[0].sharded_state_dict(metadata=dict(metadata))}

        loaded = CheckpointManager(options, context, identity).load(build_state)
        if loaded is None:
            raise CheckpointError(f"{checkpoint} holds no checkpoint: correct the path.")
        chunks[0].load_state_dict(loaded.state["model"], strict=True)
        chunks[0].eval()
        row = torch.tensor([list(tokens)], device=context.device)
        positions = torch.arange(row.shape[1], device=context.device)[None]
        with torch.no_grad():
            logits = chunks[0](row, positions, CausalPlan(), NextLogits(positions))[0, :, : vocabulary.size]
        return logits.float().cpu()
    finally:
        context.shutdown()
