"""Options of the optimizer and of the learning rate. Names and defaults are Megatron's where it has them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")


@dataclass(frozen=True)
class EngineConfig:
    """How a gradient becomes a step. An iteration here is an optimizer step that was not skipped."""

    lr: float = option(5e-4, help="Learning rate after the warm-up.", also_called=("learning_rate",))
    min_lr: float = option(0.0, help="Learning rate that the decay ends at.", also_called=("min_learning_rate",))
    lr_decay_style: str = option("linear", choices=LR_DECAY_STYLES, help="Course of the learning rate.")
    lr_decay_iters: int | None = option(None, help="Iterations until --min-lr is reached (default: --train-iters).")
    lr_warmup_iters: int = option(
        0, help="Iterations of linear warm-up.", also_called=("warmup_steps", "num_warmup_steps")
    )
    lr_warmup_init: float = option(0.0, help="Learning rate that the warm-up starts at.")
    lr_wsd_decay_style: str = option("exponential", choices=WSD_DECAY_STYLES, help="Decay at the end of WSD.")
    lr_wsd_decay_iters: int | None = option(None, help="Iterations of that decay (needed with WSD).")
    weight_decay: float = option(0.01, help="Decoupled weight decay; norms and biases have none.")
    optimizer: str = option("adam", choices=("adam",), help="Optimizer (AdamW).")
    adam_beta1: float = option(0.9, help="Adam's decay of the first moment.")
    adam_beta2: float = option(0.999, help="Adam's decay of the second moment.")
    adam_eps: float = option(1e-8, help="Adam's epsilon.")
    clip_grad: float = option(
        1.0,
        help="Global gradient norm that is clipped to; 0 is off.",
        also_called=("max_grad_norm", "grad_clip", "gradient_clip"),
    )
    accumulate_allreduce_grads_in_fp32: bool = option(
        True, help="Accumulate and reduce the gradients of a bf16 model in fp32."
    )
    max_skipped_steps: int = option(
        10, help="Consecutive steps whose gradient is NaN or Inf, and which are skipped, before the run fails."
    )

    def validate(self) -> None:
        """Checks the values against each other.

        Raises:
            ConfigurationError: with value and remedy.
        """
        self._validate_learning_rate()
        for name in ("weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{_flag(name)} is {getattr(self, name)}: give 0 (off) or more.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"{_flag(name)} is {getattr(self, name)}: it must lie in [0, 1).")
        if self.adam_eps <= 0:
            raise ConfigurationError(f"--adam-eps is {self.adam_eps}: give a small number above 0, such as 1e-8.")
        if self.max_skipped_steps < 0:
            raise ConfigurationError(
                f"--max-skipped-steps is {self.max_skipped_steps}: give 0 (fail at the first one) or more."
            )

    def _validate_learning_rate(self) -> None:
        if self.lr <= 0:
            raise ConfigurationError(f"--lr is {self.lr}: give a number above 0.")
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigurationError(f"--min-lr {self.min_lr} is not between 0 and --lr {self.lr}: lower it.")
        if not 0 <= self.lr_warmup_init <= self.lr:
            raise ConfigurationError(
                f"--lr-warmup-init {self.lr_warmup_init} is not between 0 and --lr {self.lr}: lower it."
            )
        if self.lr_warmup_iters < 0:
            raise ConfigurationError(f"--lr-warmup-iters is {self.lr_warmup_iters}: give 0 (none) or more.")
        if self.lr_decay_iters is not None and self.lr_decay_iters < 1:
            raise ConfigurationError(f"--lr-decay-iters is {self.lr_decay_iters}: give at least 1, or leave it out.")
        if self.lr_decay_style == "WSD" and (self.lr_wsd_decay_iters is None or self.lr_wsd_decay_iters < 1):
            raise ConfigurationError(
                f"--lr-decay-style WSD needs --lr-wsd-decay-iters, which is {self.lr_wsd_decay_iters}: give the "
                "number of iterations that the decay at the end takes."
            )


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
