"""Options of the held-out comparison."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.evaluation.paired import Decoding


@dataclass(frozen=True)
class EvaluationConfig:
    """Which policies are compared, by whom, on how many unseen prefixes and how they decode."""

    checkpoint: str = option(help="Directory of checkpoints of the policy under test.")
    baseline: str = option(help="Directory of checkpoints of the policy that it is compared with.")
    checkpoint_step: int | None = option(None, help="Step of --checkpoint to load in place of the latest.")
    baseline_step: int | None = option(None, help="Step of --baseline to load in place of the latest.")
    judge: str | None = option(
        None,
        help="The judge: an n-gram model or, with --teacher http, a served model; by default that of the training.",
    )
    second_judge: str | None = option(
        None, help="A second judge, likewise; one that the policy was not trained with (fitted on other documents)."
    )
    num_prefixes: int = option(600, help="Prefixes of --test-data-path that both policies continue.")
    temperature: tuple[float, ...] = option((1.0, 0.8, 0.0), help="Sampling temperatures to compare at; 0 is greedy.")
    num_seeds: int = option(1, help="Continuations per prefix and temperature (greedy: always one).")
    cut_to_shorter: bool = option(
        False,
        help="Cut both continuations of a pair to the shorter one's tokens before they are judged: who goes on for "
        "longer, or ends sooner, gains nothing by it.",
    )
    confidence: float = option(0.95, help="Of the intervals, which are over prefixes.")
    output: str | None = option(None, help="JSON file to write the result to.")

    def validate(self) -> None:
        """Raise ConfigurationError for a value that cannot work."""
        for name in ("num_prefixes", "num_seeds"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.temperature or min(self.temperature) < 0:
            raise ConfigurationError(f"--temperature {self.temperature}: give one or more numbers, 0 or above")
        if len(set(self.temperature)) != len(self.temperature):
            raise ConfigurationError(f"--temperature {self.temperature}: name each one once")
        if not 0.0 < self.confidence < 1.0:
            raise ConfigurationError(f"--confidence {self.confidence}: give a share between 0 and 1, such as 0.95")

    def decodings(self, max_new_tokens: int, seed: int) -> list[Decoding]:
        """One per temperature."""
        return [Decoding(temperature, max_new_tokens, seed, self.num_seeds) for temperature in self.temperature]
