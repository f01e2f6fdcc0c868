"""What every dry run reports: the model, its layout, the memory of a rank, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.distributed.config import ParallelConfig
from megatron_sip.engine.config import EngineConfig
from megatron_sip.errors import ConfigurationError
from megatron_sip.model.config import ModelConfig
from megatron_sip.model.presets import Architecture
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.train.estimate import BYTES_FP32, Layout, Precision, RankMemory


@dataclass(frozen=True)
class Sizes:
    """The figures that do not hang on what is trained."""

    architecture: Architecture
    preset: str
    vocab_size: int
    vocab_rows: int
    world_size: int
    layout: Layout
    num_parameters: int
    stages: tuple[RankMemory, ...]
    host_bytes: int
    """Pinned host memory of a rank for a reference that waits there."""
    device_bytes: float
    """What one rank may fill."""
    device_words: str
    """What that is, for "N GiB on ...": a device of so much memory, or a share of this machine's."""
    device_note: str
    """What was assumed of it, or nothing."""
    missing: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= self.device_bytes

    @property
    def is_ready(self) -> bool:
        """Whether the run could start: it fits, and nothing is missing."""
        return self.fits and not self.missing


def device_of(given_gib: float | None, world_size: int) -> tuple[float, str, str]:
    """Bytes for one rank, what they are, and what was assumed; without a GPU all ranks share the machine's memory."""
    if given_gib is not None:
        return given_gib * 2**30, f"a device of {given_gib:g} GiB", ""
    # Here: --help and runs that name a device need neither.
    import psutil

    from megatron_sip.distributed import device_memory_bytes, select_device

    total = device_memory_bytes(select_device(0))
    if total is not None:
        return total, f"a device of {total / 2**30:.0f} GiB", "as this machine's; --dry-run-device-gib names another"
    total = int(psutil.virtual_memory().total)
    note = f"no GPU here: {total / 2**30:.0f} GiB of memory for all ranks; --dry-run-device-gib names a device"
    return total / world_size, f"a share of {total / world_size / 2**30:.1f} GiB", note


def vocabulary_size(tokenizer: TokenizerConfig, missing: Sequence[str]) -> int:
    """That of the tokenizer, or as configured if the tokenizer is among what is ``missing``."""
    if not any(line.startswith("--tokenizer") for line in missing):
        return build_tokenizer(tokenizer).vocab_size
    if tokenizer.vocab_size is None:
        raise ConfigurationError(
            f"--tokenizer-model {tokenizer.tokenizer_model} is not at hand, so the size of the vocabulary is "
            "unknown: give --vocab-size"
        )
    return tokenizer.vocab_size


def layout_of(parallel: ParallelConfig, num_layers: int, world_size: int) -> Layout:
    """How ``world_size`` ranks split the model."""
    return Layout(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        dp=parallel.data_parallel_size(world_size),
        virtual_stages=parallel.num_virtual_stages(num_layers) or 1,
        sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=parallel.use_distributed_optimizer,
    )


def precision_of(model: ModelConfig, engine: EngineConfig) -> Precision:
    """Bytes per number of weights and gradients."""
    weight = 2 if model.bf16 else BYTES_FP32
    return Precision(weight=weight, gradient=BYTES_FP32 if engine.accumulate_allreduce_grads_in_fp32 else weight)
