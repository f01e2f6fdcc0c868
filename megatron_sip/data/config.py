"""Where the run's documents are and how they are cut into samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError

SAMPLE_CUTS = ("chunk", "random", "last")


@dataclass(frozen=True)
class DataConfig:
    """Flags of corpora and samples. Paths are those of ``.bin``/``.idx`` pairs, without the suffix."""

    data_path: tuple[str, ...] = option(
        (),
        help="Training corpora: paths, passed through one after the other and shuffled together, or a blend "
        "'weight path weight path ...'.",
        metavar="PATH",
    )
    valid_data_path: tuple[str, ...] = option((), help="Validation corpora, like --data-path.", metavar="PATH")
    test_data_path: tuple[str, ...] = option(
        (), help="Test corpora for tools/evaluate.py, like --data-path.", metavar="PATH"
    )
    judge_data_path: tuple[str, ...] = option(
        (), help="Corpora that the embedded judge is fitted on; they must not overlap --data-path.", metavar="PATH"
    )
    second_judge_data_path: tuple[str, ...] = option(
        (), help="Corpora of the held-out second judge, which no training run sees.", metavar="PATH"
    )
    seq_length: int = option(
        2048,
        help="Tokens of a next-token window, and of prefix + suffix at most.",
        also_called=("max_seq_len", "max_seq_length", "sequence_length", "context_length"),
    )
    suffix_length: int = option(128, help="N: tokens of a suffix, a rewrite and a rollout.")
    min_prefix_length: int = option(1, help="Tokens that must precede a suffix in its document.")
    min_suffix_length: int | None = option(
        None, help="Accept a shorter suffix at a document's end if it has this many tokens (default: --suffix-length)."
    )
    sample_cut: str = option(
        "chunk",
        help="'chunk': every chunk of N tokens of a document once per epoch; 'random': one random cut per document; "
        "'last': a document's last N tokens (tools/select_unsafe.py writes such documents).",
        choices=SAMPLE_CUTS,
    )
    eod_mask_loss: bool = option(False, help="Leave the prediction after an end-of-document token out of the loss.")
    data_seed: int | None = option(None, help="Seed of the sample order (default: --seed).")

    @property
    def max_prefix_length(self) -> int:
        """P: tokens of a prefix at most."""
        return self.seq_length - self.suffix_length

    def validate(self) -> None:
        """Raise ``ConfigurationError`` for lengths or paths that cannot work."""
        for name in ("seq_length", "suffix_length", "min_prefix_length"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.suffix_length >= self.seq_length:
            raise ConfigurationError(
                f"--suffix-length {self.suffix_length} leaves no room for a prefix in --seq-length {self.seq_length}; "
                f"give at most {self.seq_length - 1}"
            )
        if self.min_prefix_length > self.max_prefix_length:
            raise ConfigurationError(
                f"--min-prefix-length {self.min_prefix_length} is more than the {self.max_prefix_length} tokens that "
                f"--seq-length {self.seq_length} and --suffix-length {self.suffix_length} leave"
            )
        if self.min_suffix_length is not None and not 1 <= self.min_suffix_length <= self.suffix_length:
            raise ConfigurationError(
                f"--min-suffix-length {self.min_suffix_length}: must be 1 to --suffix-length {self.suffix_length}"
            )
        if self.data_seed is not None and self.data_seed < 0:
            raise ConfigurationError(f"--data-seed is {self.data_seed}: give 0 or more, or leave it out")
        if self.sample_cut not in SAMPLE_CUTS:
            raise ConfigurationError(f"--sample-cut {self.sample_cut}: choose {', '.join(SAMPLE_CUTS)}")
        for name in ("data_path", "valid_data_path", "test_data_path", "judge_data_path", "second_judge_data_path"):
            parse_blend(getattr(self, name), f"--{name.replace('_', '-')}")


def parse_blend(values: Sequence[str], flag: str = "--data-path") -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Megatron's notation: (paths, weights), weights None for plain paths. Raises ``ConfigurationError``."""
    if not values or _number(values[0]) is None:
        wrong = [value for value in values if _number(value) is not None]
        if wrong:
            raise ConfigurationError(
                f"{flag}: the weight {wrong[0]} follows a path; write 'weight path weight path ...'"
            )
        if len(set(values)) != len(values):
            raise ConfigurationError(f"{flag}: a path is given twice; use weights to repeat a corpus")
        return tuple(values), None
    weights = [_number(value) for value in values[::2]]
    paths = values[1::2]
    if len(weights) != len(paths) or None in weights or any(_number(path) is not None for path in paths):
        raise ConfigurationError(f"{flag} {' '.join(values)}: write 'weight path weight path ...'")
    numbers = tuple(weight for weight in weights if weight is not None)
    for number in numbers:
        if not 0 < number < math.inf:
            raise ConfigurationError(f"{flag}: weight {number} must be a number above 0; leave the corpus out instead")
    return tuple(paths), numbers


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
