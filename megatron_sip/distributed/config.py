"""How one job's ranks split the work."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError

_LONGEST_TIMEOUT = 7 * 24 * 60


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the model-parallel groups; what is left of the world is data parallel."""

    tensor_model_parallel_size: int = option(
        1,
        help="Ranks that share each layer's matrices (TP).",
        metavar="TP",
        also_called=("tp", "tp_size", "tensor_parallel_size"),
    )
    pipeline_model_parallel_size: int = option(
        1,
        help="Ranks that share the stack of layers (PP).",
        metavar="PP",
        also_called=("pp", "pp_size", "pipeline_parallel_size"),
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, help="Layers of one virtual stage: switches the interleaved pipeline schedule on (needs PP > 1)."
    )
    sequence_parallel: bool = option(
        False, help="Split norms and residuals along the sequence over the tensor-parallel ranks (needs TP > 1)."
    )
    context_parallel_size: int = option(1, help="Only 1: context parallelism is not supported.")
    expert_model_parallel_size: int = option(1, help="Only 1: the models are dense, there are no experts.")
    distributed_timeout_minutes: int = option(10, help="A collective that waits longer than this fails the job.")
    use_distributed_optimizer: bool = option(True, help="Shard the optimizer state over the data-parallel ranks.")
    overlap_grad_reduce: bool = option(False, help="Overlap the gradient reduction with the backward pass.")
    overlap_param_gather: bool = option(False, help="Overlap the parameter all-gather with the forward pass.")

    def validate(self) -> None:
        """Checks what can be known before the world size and the model are.

        Raises:
            ConfigurationError: a size that cannot work, with its remedy.
        """
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "distributed_timeout_minutes"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{_flag(name)} is {getattr(self, name)}: give a number of at least 1.")
        if self.distributed_timeout_minutes > _LONGEST_TIMEOUT:
            raise ConfigurationError(
                f"--distributed-timeout-minutes is {self.distributed_timeout_minutes}: give at most {_LONGEST_TIMEOUT} "
                "(a week)."
            )
        if self.context_parallel_size != 1:
            raise ConfigurationError(
                f"--context-parallel-size is {self.context_parallel_size}, but context parallelism is not supported: "
                "rows share their prefix, which it would cut. Set it to 1; use --sequence-parallel, "
                "--recompute-granularity or a larger --tensor-model-parallel-size to save memory."
            )
        if self.expert_model_parallel_size != 1:
            raise ConfigurationError(
                f"--expert-model-parallel-size is {self.expert_model_parallel_size}, but expert parallelism is not "
                "supported: the models are dense. Set it to 1."
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigurationError(
                "--sequence-parallel needs --tensor-model-parallel-size of at least 2, which is 1: drop the one or "
                "raise the other."
            )
        if self.num_layers_per_virtual_pipeline_stage is not None:
            if self.num_layers_per_virtual_pipeline_stage < 1:
                raise ConfigurationError(
                    f"--num-layers-per-virtual-pipeline-stage is {self.num_layers_per_virtual_pipeline_stage}: "
                    "give a number of at least 1, or leave it out."
                )
            if self.pipeline_model_parallel_size == 1:
                raise ConfigurationError(
                    "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2, "
                    "which is 1: leave it out or raise the other."
                )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigurationError(
                "--overlap-param-gather needs --overlap-grad-reduce and the distributed optimizer: switch both on."
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas in a world of ``world_size`` ranks.

        Raises:
            ConfigurationError: the world does not divide into replicas.
        """
        if world_size % self.model_parallel_size:
            raise ConfigurationError(
                f"{world_size} ranks do not divide into replicas of tensor {self.tensor_model_parallel_size} x "
                f"pipeline {self.pipeline_model_parallel_size} = {self.model_parallel_size} ranks: start a multiple of "
                f"{self.model_parallel_size} with torchrun --nproc-per-node, or lower a parallel size."
            )
        return world_size // self.model_parallel_size

    def num_virtual_stages(self, num_layers: int) -> int | None:
        """Model chunks per pipeline rank, or None without virtual stages.

        Raises:
            ConfigurationError: ``num_layers`` do not divide into the stages.
        """
        if num_layers % self.pipeline_model_parallel_size:
            raise ConfigurationError(
                f"--num-layers {num_layers} is not divisible by --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size}: change one of them."
            )
        per_virtual_stage = self.num_layers_per_virtual_pipeline_stage
        if per_virtual_stage is None:
            return None
        per_rank = num_layers // self.pipeline_model_parallel_size
        if per_rank % per_virtual_stage:
            raise ConfigurationError(
                f"--num-layers-per-virtual-pipeline-stage {per_virtual_stage} does not divide the {per_rank} layers of "
                "each pipeline rank: choose a divisor."
            )
        return per_rank // per_virtual_stage


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
