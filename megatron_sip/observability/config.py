"""Options of logging, recorded samples and alarms."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError


@dataclass(frozen=True)
class ObservabilityConfig:
    """Where a run writes what it did, how often, and when it warns about its policy."""

    run_dir: str | None = option(
        None,
        help="Folder of the run: metrics.jsonl, samples.jsonl, run.json and report.html, and unless told otherwise "
        "checkpoints/ and tensorboard/; without it none is written.",
        metavar="DIR",
    )
    tensorboard_dir: str | None = option(
        None,
        help="Folder for TensorBoard event files (default: tensorboard/ in --run-dir; none: none are written).",
        metavar="DIR",
    )
    log_interval: int = option(10, help="Steps between two lines on the console; metrics are logged every step.")
    log_samples: int = option(2, help="Judged prefixes recorded with all their candidates at each recorded step.")
    log_samples_interval: int = option(10, help="Steps between two steps whose samples are recorded.")
    peak_tflops: float | None = option(
        None, help="Peak TFLOP/s of one device at the run's precision, for mfu; without it mfu is not logged."
    )
    alarm_interval: int = option(50, help="An alarm that holds is repeated after this many steps.")
    alarm_min_length: float = option(0.25, help="Warn if rollouts are on average shorter than this part of the limit.")
    alarm_max_repetition: float = option(
        0.15, help="Warn if more than this part of the trigrams repeats an earlier one of the same rollout."
    )
    alarm_min_distinct_2: float = option(0.33, help="Warn if less than this part of a step's bigrams is distinct.")
    alarm_max_token_share: float = option(0.25, help="Warn if one token makes up more than this part of all tokens.")
    alarm_max_shared_trigrams: float = option(
        0.5, help="Warn if more than this part of the trigrams also occurs in rollouts of another prefix."
    )
    alarm_min_entropy: float = option(1.0, help="Warn if the policy's entropy is less, in nats per token.")
    alarm_max_kl: float = option(1.0, help="Warn if the KL to the reference is more, in nats per token.")

    def validate(self) -> None:
        """Raise ConfigurationError for a value that cannot work."""
        for name in ("log_interval", "log_samples_interval", "alarm_interval"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} {value} must be at least 1: give a number of steps"
                )
        if self.log_samples < 0:
            raise ConfigurationError(f"--log-samples {self.log_samples} must not be negative: 0 records none")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ConfigurationError(f"--peak-tflops {self.peak_tflops} must be positive: leave it out if unknown")
        fractions = (
            "alarm_min_length",
            "alarm_max_repetition",
            "alarm_min_distinct_2",
            "alarm_max_token_share",
            "alarm_max_shared_trigrams",
        )
        for name in fractions:
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigurationError(f"--{name.replace('_', '-')} {value} is a part of the whole: give 0 to 1")
        for name in ("alarm_min_entropy", "alarm_max_kl"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} {value} must not be negative: give nats per token"
                )
