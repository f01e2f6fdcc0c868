"""Options of saving, resuming and stopping."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go to and come from; the names are Megatron-LM's where it has one."""

    save: str | None = option(
        None,
        help="Directory that receives checkpoints (default: checkpoints/ in --run-dir; none: nothing is saved).",
        metavar="DIR",
        also_called=("output_dir", "save_dir"),
    )
    save_interval: int | None = option(None, help="Steps between checkpoints; without it only the last one is saved.")
    keep_last: int | None = option(None, help="Number of checkpoints to keep; without it all are kept.")
    async_save: bool = option(False, help="Write checkpoints in a background process while training goes on.")
    async_save_timeout_minutes: float = option(
        30.0, help="A background writer that takes longer counts as dead: it is ended and the save fails."
    )
    on_save_failure: str = option(
        "stop",
        choices=("stop", "continue"),
        help="What a failed save (a full disk) does to the run; earlier checkpoints stay intact either way.",
    )
    load: str | None = option(
        None,
        help="Directory to resume from, if it has checkpoints (default: checkpoints/ in --run-dir; none: afresh).",
        metavar="DIR",
        also_called=("resume", "resume_from_checkpoint", "load_dir"),
    )
    ckpt_step: int | None = option(None, help="Step to load in place of the latest one.")
    pretrained_checkpoint: str | None = option(
        None,
        help="Directory whose weights a run starts from, at step 0, if --load holds no checkpoint yet.",
        metavar="DIR",
    )
    finetune: bool = option(False, help="Load weights only and start at step 0 with fresh data and optimizer.")
    no_load_optim: bool = option(False, help="Do not load the optimizer and learning-rate state.")
    no_load_rng: bool = option(False, help="Do not take the random-number counters from the checkpoint.")
    no_save_optim: bool = option(False, help="Leave the optimizer state out of checkpoints.")
    exit_on_missing_checkpoint: bool = option(False, help="Fail if --load holds no checkpoint, instead of starting.")
    exit_duration_in_mins: float | None = option(None, help="Save and exit after this many minutes of training.")

    def validate(self) -> None:
        """Checks single values and their combinations.

        Raises:
            ConfigurationError: naming the value and the remedy.
        """
        for name in ("save_interval", "keep_last", "async_save_timeout_minutes", "exit_duration_in_mins"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{_flag(name)} is {value}: give a positive number, or leave it out.")
        if self.save_interval is not None and self.save is None:
            raise ConfigurationError(
                f"--save-interval {self.save_interval} has nowhere to save to: add --save DIR or --run-dir DIR."
            )
        if self.on_save_failure not in ("stop", "continue"):
            raise ConfigurationError(f"--on-save-failure is {self.on_save_failure!r}: choose 'stop' or 'continue'.")
        if self.ckpt_step is not None and self.load is None:
            raise ConfigurationError(f"--ckpt-step {self.ckpt_step} says which step to load: add --load DIR.")
        if self.ckpt_step is not None and self.ckpt_step < 0:
            raise ConfigurationError(f"--ckpt-step is {self.ckpt_step}: give the number of a saved step.")
        if self.finetune and self.load is None:
            raise ConfigurationError("--finetune takes its weights from --load: add --load DIR.")
        if self.exit_on_missing_checkpoint and self.load is None:
            raise ConfigurationError("--exit-on-missing-checkpoint is about --load: add --load DIR, or leave it out.")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
