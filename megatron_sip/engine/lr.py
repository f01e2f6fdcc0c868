"""The learning rate as a pure function of the number of optimizer steps done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sip.engine.config import WSD_DECAY_STYLES, EngineConfig
from megatron_sip.errors import ConfigurationError


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then a decay: the formulas of ``megatron.core.optimizer_param_scheduler``, in iterations.

    ``schedule(n)`` is the rate of the step that follows n steps. Unlike Megatron's scheduler it has no state, so that a
    resumed run cannot disagree with it.
    """

    config: EngineConfig
    decay_iters: int

    @classmethod
    def of(cls, config: EngineConfig, train_iters: int) -> LearningRate:
        """The schedule of a run of ``train_iters`` iterations.

        Raises:
            ConfigurationError: the warm-up, or the decay at the end of WSD, does not fit into the decay's iterations.
        """
        decay_iters = train_iters if config.lr_decay_iters is None else config.lr_decay_iters
        if config.lr_decay_style != "constant" and config.lr_warmup_iters >= decay_iters:
            raise ConfigurationError(
                f"--lr-warmup-iters {config.lr_warmup_iters} does not end before the {decay_iters} iterations of "
                "--lr-decay-iters (default: --train-iters): shorten the warm-up or lengthen the run."
            )
        if config.lr_decay_style == "WSD":
            wsd_iters = config.lr_wsd_decay_iters or 0
            if wsd_iters > decay_iters - config.lr_warmup_iters:
                raise ConfigurationError(
                    f"--lr-wsd-decay-iters {wsd_iters} and --lr-warmup-iters {config.lr_warmup_iters} together exceed "
                    f"the {decay_iters} iterations of --lr-decay-iters: shorten one of them."
                )
        return cls(config, decay_iters)

    def __call__(self, step: int) -> float:
        """Learning rate after ``step`` optimizer steps."""
        config = self.config
        warmup = config.lr_warmup_iters
        if warmup > 0 and step <= warmup:
            return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * step / warmup
        if config.lr_decay_style == "constant":
            return config.lr
        if step > self.decay_iters:
            return config.min_lr
        if config.lr_decay_style == "inverse-square-root":
            return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(step, 1)))
        return config.min_lr + self._remaining(step) * (config.lr - config.min_lr)

    def _remaining(self, step: int) -> float:
        """Share of the way from ``min_lr`` to ``lr`` that is left."""
        config = self.config
        if config.lr_decay_style == "WSD":
            done = step - (self.decay_iters - (config.lr_wsd_decay_iters or 0))
            return 1.0 if done <= 0 else _decayed(config.lr_wsd_decay_style, done / (config.lr_wsd_decay_iters or 1))
        ratio = (step - config.lr_warmup_iters) / (self.decay_iters - config.lr_warmup_iters)
        return _decayed(config.lr_decay_style, ratio)


def _decayed(style: str, ratio: float) -> float:
    """What is left of 1 after ``ratio`` (0 to 1) of a decay."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**ratio - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(ratio)
    raise ConfigurationError(f"learning-rate decay style {style!r} is not known: choose one of {WSD_DECAY_STYLES}")
