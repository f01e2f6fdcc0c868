"""Models out of checkpoints, for those who do not train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_sip.checkpoint import CheckpointConfig, CheckpointManager, ModelIdentity, identity_of
from megatron_sip.checkpoint.huggingface.megatron_side import open_checkpoint
from megatron_sip.checkpoint.huggingface.names import CARRIED_DIRECTORY
from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import CheckpointError
from megatron_sip.huggingface.vocabulary import carry
from megatron_sip.model import ModelConfig, PolicyModel, build_model
from megatron_sip.model.presets import Architecture
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig


def load_weights(
    chunks: Sequence[PolicyModel], identity: ModelIdentity, directory: str, step: int | None, context: ParallelContext
) -> None:
    """Puts the weights of a checkpoint into a model. Collective.

    Raises:
        CheckpointError: there is none, or it is of another model.
    """
    config = CheckpointConfig(load=directory, ckpt_step=step, finetune=True)
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]

    def build_state(*, is_loading: bool, with_optimizer: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
        named = zip(names, chunks, strict=True)
        return {name: chunk.sharded_state_dict(metadata=dict(metadata)) for name, chunk in named}

    loaded = CheckpointManager(config, context, identity).load(build_state)
    assert loaded is not None
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(loaded.state[name], strict=True)


def carry_tokenizer(checkpoints: CheckpointConfig, tokenizer: TokenizerConfig, context: ParallelContext) -> None:
    """Puts the run's tokenizer of transformers beside its checkpoints, for tools/export_policy.py. Collective.

    It is what the run works with, or, where that is another library's form of it, what came with the weights.

    Raises:
        CheckpointError: it cannot be written; on all ranks.
    """
    source = _tokenizer_directory(checkpoints, tokenizer)
    if checkpoints.save is None or source is None:
        return
    target, problem = Path(checkpoints.save) / CARRIED_DIRECTORY, ""
    if context.rank == 0 and source.is_dir() and source.resolve() != target.resolve():
        try:
            target.mkdir(parents=True, exist_ok=True)
            carry(source, target)
        except OSError as error:
            problem = f"the tokenizer cannot be put into {target}: {error.strerror}; correct --save."
    problem = context.broadcast_from_rank_zero(problem)
    if problem:
        raise CheckpointError(problem)


def _tokenizer_directory(checkpoints: CheckpointConfig, tokenizer: TokenizerConfig) -> Path | None:
    if tokenizer.tokenizer_type == "HuggingFaceTokenizer":
        return Path(tokenizer.tokenizer_model or "")
    start = checkpoints.pretrained_checkpoint
    return None if start is None else Path(start) / CARRIED_DIRECTORY


def open_model(directory: str, tokenizer: Tokenizer, context: ParallelContext) -> tuple[list[PolicyModel], str]:
    """The model of the latest checkpoint under ``directory``, of its own architecture, named by its folder.

    Raises:
        CheckpointError: there is none, it is damaged, or the tokenizer is not its own.
    """
    source = open_checkpoint(Path(directory), None)
    if source.vocab_size != tokenizer.vocab_size or source.fingerprint not in ("", tokenizer.fingerprint):
        raise CheckpointError(
            f"{directory} is of a vocabulary of {source.vocab_size} ({source.fingerprint or 'no fingerprint'}), the "
            f"tokenizer has {tokenizer.vocab_size} ({tokenizer.fingerprint}): name its own by --judge-tokenizer-model"
        )
    architecture = source.architecture(None)
    chunks = build_model(model_config_of(architecture), tokenizer.vocab_size, context)
    identity = identity_of(architecture, tokenizer.vocab_size, tokenizer.fingerprint)
    load_weights(chunks, identity, directory, None, context)
    return chunks, str(source.directory)


def model_config_of(architecture: Architecture) -> ModelConfig:
    """Options that resolve to this architecture."""
    names = {field.name for field in fields(ModelConfig)}
    numbers = {name: value for name, value in asdict(architecture).items() if name in names}
    scaling = architecture.rope_scaling
    if scaling is None:
        return ModelConfig(**numbers, use_rope_scaling=False)
    return ModelConfig(
        **numbers,
        use_rope_scaling=True,
        rope_scaling_factor=scaling.factor,
        rope_low_freq_factor=scaling.low_freq_factor,
        rope_high_freq_factor=scaling.high_freq_factor,
        rope_original_max_position_embeddings=scaling.original_max_position_embeddings,
    )
