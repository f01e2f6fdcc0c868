"""Everything that can be configured in a training of the teacher."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from megatron_sip.checkpoint.config import CheckpointConfig
from megatron_sip.config import load
from megatron_sip.config.fields import option
from megatron_sip.data.config import parse_blend
from megatron_sip.distributed.config import ParallelConfig
from megatron_sip.engine.config import EngineConfig
from megatron_sip.errors import ConfigurationError
from megatron_sip.model.config import ModelConfig
from megatron_sip.objectives.config import GRPOConfig
from megatron_sip.observability.config import ObservabilityConfig
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.tokenizer.config import TokenizerConfig
from megatron_sip.train.run_dir import in_run_dir

TASKS = ("judge", "rewriter")
_COUNTS = (
    "train_iters", "micro_batch_size", "global_batch_size", "generations", "batch_passes", "mini_batches",
    "prompt_length", "eval_samples", "eval_generations",
)  # fmt: skip


@dataclass(frozen=True)
class TaskConfig:
    """Prompts, rollouts and updates of a step, and the rhythm of the run."""

    train_data: tuple[str, ...] = option(
        help="JSON lines of tools/make_judge_data.py, or a blend: weight file weight file ...", metavar="JSONL"
    )
    train_iters: int = option(help="batches of rollouts of the whole run")
    valid_data: tuple[str, ...] = option((), help="the same, held out: its rewards are measured", metavar="JSONL")
    global_batch_size: int = option(256, help="prompts of a step, over all replicas")
    micro_batch_size: int = option(1, help="prompts, each with all its rollouts, of one forward pass on one replica")
    generations: int = option(16, help="rollouts per prompt; how long they may be says --rollout-max-new-tokens")
    batch_passes: int = option(1, help="times that a batch of rollouts is learned from")
    mini_batches: int = option(1, help="optimizer steps of one such pass: the batch is cut into as many parts")
    prompt_length: int = option(3584, help="tokens of a prompt; a longer one loses the beginning of its prefix")
    eval_interval: int = option(25, help="steps between two measurements on --valid-data; 0 is never")
    eval_samples: int = option(512, help="held-out examples of such a measurement; no more than there are")
    eval_generations: int = option(1, help="rollouts for each of them, drawn as in training")
    seed: int = option(1234, help="seed of initial weights, data order and rollouts")
    dry_run: bool = option(False, help="check the configuration, print sizes, batches and what is missing; exit")
    dry_run_world_size: int | None = option(
        None, help="ranks of the planned job for --dry-run (default: WORLD_SIZE, else one replica: TP x PP)"
    )
    dry_run_device_gib: float | None = option(
        None, help="memory of one device for --dry-run, in GiB (default: this machine's GPU, else the machine's memory)"
    )

    def validate(self) -> None:
        """Raise ConfigurationError for a value that cannot work."""
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        for name in ("dry_run_world_size", "dry_run_device_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {value}: give a number above 0")
        for name in ("eval_interval", "seed"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 0")
        if self.generations < 2:
            raise ConfigurationError(
                f"--generations is {self.generations}: a group of one has no spread to learn from; give at least 2"
            )
        parse_blend(self.train_data, "--train-data")
        parse_blend(self.valid_data, "--valid-data")

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per batch of rollouts, if each has something to teach."""
        return self.batch_passes * self.mini_batches


@dataclass(frozen=True)
class GRPORunConfig:
    """All sections, in the order in which --help lists them."""

    task: TaskConfig
    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    tokenizer: TokenizerConfig
    rollout: RolloutConfig
    grpo: GRPOConfig
    teacher: TeacherConfig
    checkpoint: CheckpointConfig
    observability: ObservabilityConfig

    @property
    def answer_length(self) -> int:
        """New tokens of an answer at most."""
        assert self.rollout.rollout_max_new_tokens is not None
        return self.rollout.rollout_max_new_tokens

    def completed(self, given: Set[str]) -> GRPORunConfig:
        """With the defaults that follow from other options; ``given``: names of those that are not defaults."""
        checkpoint, observability = in_run_dir(self.checkpoint, self.observability, given)
        return replace(self, checkpoint=checkpoint, observability=observability)

    def validate(self) -> None:
        """Checks the sections against each other; what needs the world size is in ``check_layout``."""
        if self.rollout.rollout_max_new_tokens is None:
            raise ConfigurationError(
                "--rollout-max-new-tokens is missing: give the longest answer in tokens (the paper: 512 for a judge, "
                "128 for a rewriter)"
            )
        model = self.model.resolve()
        self.model.validate_tensor_parallel(self.parallel.tensor_model_parallel_size)
        self.parallel.num_virtual_stages(model.num_layers)
        longest = self.task.prompt_length + self.answer_length
        if longest > model.max_position_embeddings:
            raise ConfigurationError(
                f"--prompt-length {self.task.prompt_length} and --rollout-max-new-tokens {self.answer_length} are "
                f"{longest} tokens, more than the {model.max_position_embeddings} positions of the model: shorten them"
            )
        if self.rollout.rollout_temperature == 0:
            raise ConfigurationError(
                "--rollout-temperature is 0: all rollouts of a prompt would be equal and teach nothing; the paper has "
                "0.6"
            )

    def check_layout(self, world_size: int) -> None:
        """Raise ConfigurationError unless ``world_size`` ranks can share the work."""
        dp = self.parallel.data_parallel_size(world_size)
        task = self.task
        unit = dp * task.mini_batches
        if task.global_batch_size % unit:
            raise ConfigurationError(
                f"--global-batch-size {task.global_batch_size} is not divisible by data-parallel size {dp} x "
                f"--mini-batches {task.mini_batches} = {unit}: make it a multiple of {unit}"
            )


def load_grpo_config(argv: Sequence[str], task: str) -> GRPORunConfig:
    """The configuration of ``tools/train_<task>.py`` from its command line.

    ``--help``, ``--version`` and ``--print-config`` print and raise ``SystemExit(0)``. Raises ConfigurationError.
    """
    description = f"Trains a {task} by GRPO. Start it with torchrun, one process per device. Flags win over recipes."
    return load(GRPORunConfig, argv, prog=f"train_{task}.py", description=description)
