"""What the ranks of a launch do with converted checkpoints, and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_sip.checkpoint import CheckpointConfig, CheckpointManager, identity_of
from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.evaluation.scoring import PolicyScorer
from megatron_sip.huggingface.config_json import architecture_of, read_config
from megatron_sip.model import ModelConfig, PolicyModel, build_model
from megatron_sip.rollout.vllm.weights import StageWeights
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.train.weights import carry_tokenizer

ROWS = torch.tensor([[7, 200, 31, 4, 99, 256, 0, 5, 5, 61, 150, 3], [1, 2, 3, 4, 250, 6, 7, 8, 9, 10, 11, 12]])


def carry(payload: dict[str, Any]) -> None:
    """What a run does at its start."""
    context = initialize(ParallelConfig(), seed=3)
    tokenizer = TokenizerConfig(payload["type"], payload["tokenizer"])
    options = CheckpointConfig(save=payload["save"], pretrained_checkpoint=payload["start"])
    carry_tokenizer(options, tokenizer, context)


def load_recipe(root: Path, context: ParallelContext) -> tuple[list[PolicyModel], Any, Any]:
    """The converted model as a run would load it: by the recipe beside it. Returns chunks, manager and state."""
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    config = ModelConfig(**recipe["model"], make_vocab_size_divisible_by=16)
    tokenizer = build_tokenizer(TokenizerConfig(**recipe["tokenizer"]))
    chunks = build_model(config, tokenizer.vocab_size, context)
    identity = identity_of(config.resolve(), tokenizer.vocab_size, tokenizer.fingerprint)
    options = CheckpointConfig(save=str(root / "again"), **recipe["checkpoint"])
    manager = CheckpointManager(options, context, identity)

    def state(*, is_loading: bool, with_optimizer: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": chunks[0].sharded_state_dict(metadata=dict(metadata))}

    loaded = manager.load(state)
    assert loaded is not None and loaded.weights_only and loaded.step == 0
    chunks[0].load_state_dict(loaded.state["model"], strict=True)
    return chunks, manager, state


def converted_models(payload: dict[str, Any]) -> dict[str, Any]:
    """Logits of each model at a layout; saves one of them again from there."""
    context = initialize(ParallelConfig(**payload["sizes"]), seed=1)
    report: dict[str, Any] = {}
    for kind, root in payload["roots"].items():
        chunks, manager, state = load_recipe(Path(root), context)
        size = chunks[0].num_tokens
        scorer = PolicyScorer(chunks, context, size)
        positions = torch.arange(ROWS.shape[1]).expand_as(ROWS)
        logits = scorer.logits(ROWS, positions)
        following = ROWS.roll(-1, dims=1)
        scores, best = scorer.log_probs_and_best(ROWS, following, positions)
        report[kind] = {
            "logits": None if logits is None else logits.cpu().numpy(),
            "best": np.asarray(best),
            "log_probs": np.asarray(scores),
            "scored_alone": np.asarray(scorer.log_probs(ROWS, following, positions)),
        }
        architecture = architecture_of(read_config(Path(root) / "huggingface"), Path(root))
        streamed = StageWeights(chunks, context, architecture, size)
        report[kind]["weights"] = {name: tensor.clone().numpy() for name, tensor in streamed}
        report[kind]["planned"] = [(name, shape) for name, (_, shape) in streamed.plan().items()]
        if kind in payload["save"]:
            manager.save(30, state, {})
    return report
