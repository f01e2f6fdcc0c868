"""Everything that can be configured in a training run: the sections of all packages, and the run's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from megatron_sip.checkpoint.config import CheckpointConfig
from megatron_sip.config import from_mapping, load
from megatron_sip.config.fields import option
from megatron_sip.curriculum.config import CurriculumConfig
from megatron_sip.data.config import DataConfig
from megatron_sip.distributed.config import ParallelConfig
from megatron_sip.engine.config import EngineConfig
from megatron_sip.errors import ConfigurationError
from megatron_sip.model.config import ModelConfig
from megatron_sip.objectives.config import ObjectiveConfig
from megatron_sip.observability.config import ObservabilityConfig
from megatron_sip.preference.config import PreferenceConfig
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.tokenizer.config import TokenizerConfig
from megatron_sip.train.checks import check_sections
from megatron_sip.train.run_dir import in_run_dir

_DESCRIPTION = """Trains a language model by Self-Improving Pretraining. Start it with torchrun, one process per device.
Every flag is also a key of a recipe, with underscores; flags win over recipes. A switch --x has its opposite --no-x."""


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, length and rhythm of the run."""

    train_iters: int = option(
        help="optimizer steps of the whole run", also_called=("max_steps", "num_steps", "train_steps")
    )
    micro_batch_size: int = option(
        1, help="next-token rows of one forward pass on one replica", also_called=("per_device_train_batch_size",)
    )
    rollout_micro_batch_size: int | None = option(
        None, help="the same for rows of the suffix, rewrite and rollout streams (default: --micro-batch-size)"
    )
    global_batch_size: int = option(
        256,
        help="corpus samples of a step: a next-token window, a rewrite and a group of candidates count one each",
        also_called=("batch_size", "train_batch_size"),
    )
    eval_interval: int = option(1000, help="steps between two measurements of the validation loss; 0 is never")
    eval_iters: int = option(10, help="global batches of windows of such a measurement; 0 measures none")
    probe_interval: int = option(
        0, help="steps between two probes that judge held-out prefixes without training on them; 0 is never"
    )
    probe_samples: int = option(
        64, help="held-out prefixes of a probe, also of one that a curriculum's trigger asks for"
    )
    seed: int = option(1234, help="seed of initial weights, data order, rollouts and the judge's order of options")
    lookahead: int = option(
        0, help="steps whose candidates are with the judge ahead of training: 0 keeps policy and rollouts in step"
    )
    rewrite_lookahead: int = option(
        1,
        help="steps whose rewrites are asked for beyond those whose candidates are with the judge; no rewrite is stale "
        "for it, since rewrites need no weights",
    )
    on_late_judgment: str = option(
        "wait",
        choices=("wait", "fill"),
        help="what a step does when verdicts are late: wait, or fill it with next-token rows",
    )
    late_fill_limit: float = option(
        1.0, help="next-token rows that fill a step at most, in global batches; then it waits"
    )
    replay_fills: str = option(
        "", help="metrics.jsonl of a run with fill: fill each step as it was filled there, whenever verdicts come"
    )
    reference_scoring: str = option(
        "late",
        choices=("late", "early"),
        help="log-probs of the reference: late, of what is trained on, after the verdicts; early, of all candidates "
        "while the judge works (without --lookahead, where the judge takes longer than that)",
    )
    judge_pause_failure_rate: float = option(
        0.5, help="share of judge calls failing for their servers from which on training pauses until these are back; "
        "0 never pauses"
    )  # fmt: skip
    judge_pause_window: int = option(1, help="steps over which this share is measured")
    dry_run: bool = option(
        False, help="check the configuration and print sizes, batches, judge calls and what is missing; exit"
    )
    dry_run_world_size: int | None = option(
        None, help="ranks of the planned job for --dry-run (default: WORLD_SIZE, else one replica: TP x PP)"
    )
    dry_run_corpus_samples: int | None = option(
        None, help="samples of the corpus for --dry-run, where the corpus is not at hand"
    )
    dry_run_device_gib: float | None = option(
        None, help="memory of one device for --dry-run, in GiB (default: this machine's GPU, else the machine's memory)"
    )

    @property
    def judged_micro_batch_size(self) -> int:
        """Rows of a micro-batch of the suffix, rewrite and rollout streams."""
        return self.rollout_micro_batch_size or self.micro_batch_size

    @property
    def stream_micro_batch_sizes(self) -> Mapping[str, int]:
        """As ``Curriculum`` takes them."""
        return {"ntp": self.micro_batch_size, "default": self.judged_micro_batch_size}

    def validate(self) -> None:
        """Raise ConfigurationError for a value that cannot work."""
        for name in ("micro_batch_size", "global_batch_size", "train_iters", "probe_samples", "judge_pause_window"):
            _at_least(self, name, 1)
        for name in ("rollout_micro_batch_size", "dry_run_world_size", "dry_run_corpus_samples"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        for name in ("eval_interval", "eval_iters", "probe_interval", "seed", "lookahead", "rewrite_lookahead"):
            _at_least(self, name, 0)
        if not 0 <= self.judge_pause_failure_rate <= 1:
            raise ConfigurationError(
                f"--judge-pause-failure-rate is {self.judge_pause_failure_rate}: give a share from 0 to 1"
            )
        if self.late_fill_limit <= 0:
            raise ConfigurationError(f"--late-fill-limit is {self.late_fill_limit}: give a number above 0")
        if self.dry_run_device_gib is not None and self.dry_run_device_gib <= 0:
            raise ConfigurationError(f"--dry-run-device-gib is {self.dry_run_device_gib}: give a number above 0")


def _at_least(config: TrainingConfig, name: str, low: int) -> None:
    value = getattr(config, name)
    if value < low:
        raise ConfigurationError(f"--{name.replace('_', '-')} is {value}: give at least {low}")


@dataclass(frozen=True)
class TrainConfig:
    """All sections, in the order in which --help lists them."""

    training: TrainingConfig
    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    curriculum: CurriculumConfig
    rollout: RolloutConfig
    teacher: TeacherConfig
    preference: PreferenceConfig
    objective: ObjectiveConfig
    checkpoint: CheckpointConfig
    observability: ObservabilityConfig

    def completed(self, given: Set[str]) -> TrainConfig:
        """With the defaults that follow from other options; ``given``: names of those that are not defaults."""
        checkpoint, observability = in_run_dir(self.checkpoint, self.observability, given)
        return replace(self, checkpoint=checkpoint, observability=observability)

    def validate(self) -> None:
        """Checks the sections against each other; what needs the world size is in ``checks.check_layout``."""
        check_sections(self)


def load_train_config(argv: Sequence[str]) -> TrainConfig:
    """The configuration of ``pretrain_sip.py`` from its command line.

    ``--help``, ``--version`` and ``--print-config`` print and raise ``SystemExit(0)``.

    Raises:
        ConfigurationError: anything that the user can mend, in one line.
    """
    return load(TrainConfig, argv, prog="pretrain_sip.py", description=_DESCRIPTION)


def train_config_from(mapping: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """The configuration from a mapping as a recipe holds it, sections or flat keys. Raises ConfigurationError."""
    return from_mapping(TrainConfig, mapping, source)
