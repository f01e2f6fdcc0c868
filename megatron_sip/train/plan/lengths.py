"""Prefix lengths of a step: those of the corpus where it is at hand, else one length for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_sip.data.build import SUFFIX, build_loader
from megatron_sip.errors import ConfigurationError
from megatron_sip.preference.config import PREFIX_BUCKET
from megatron_sip.tokenizer import build_tokenizer
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.plan.costs import Rows

_SAMPLES = 512


@dataclass(frozen=True)
class PrefixLengths:
    """Tokens of the prefixes of consecutive samples."""

    tokens: tuple[int, ...]
    origin: str
    """Where they come from, for the report."""

    @property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    def take(self, count: int) -> list[int]:
        """``count`` lengths, from the beginning again where there are fewer."""
        times = -(-count // len(self.tokens))
        return list(self.tokens * times)[:count]


def prefix_lengths(config: TrainConfig, missing: Sequence[str], given: int | None) -> PrefixLengths:
    """``given`` for every prefix; or the corpus's own; or without a corpus the longest.

    Raises ConfigurationError for a length that a sample cannot have, DataError for a broken corpus.
    """
    longest = config.data.max_prefix_length
    if given is not None:
        if not 1 <= given <= longest:
            raise ConfigurationError(
                f"--prefix-tokens is {given}: give 1 to {longest} (--seq-length - --suffix-length)"
            )
        return PrefixLengths((given,), "as --prefix-tokens says")
    if any(line.startswith(("--data-path", "--tokenizer")) for line in missing):
        return PrefixLengths((longest,), "the longest; --prefix-tokens gives another, as no corpus is at hand")
    tokenizer = build_tokenizer(config.tokenizer)
    loader = build_loader(config.data, config.data.data_path, tokenizer, config.training.seed, [SUFFIX])
    count = min(_SAMPLES, loader.epoch_length(SUFFIX))
    tokens = tuple(len(sample.prefix) for sample in loader.take(SUFFIX, count))
    return PrefixLengths(tokens, f"of the corpus's first {count} samples")


def candidate_rows(
    lengths: Sequence[int], micro_batch_size: int, num_candidates: int, candidate_tokens: int
) -> Iterator[Rows]:
    """The micro-batches of rows with these prefixes, as ``preference.rows.build_rows`` packs them."""
    longest = max(lengths)
    for start in range(0, len(lengths), micro_batch_size):
        part = lengths[start : start + micro_batch_size]
        width = min(-(-max(part) // PREFIX_BUCKET) * PREFIX_BUCKET, longest)
        # Fillers of the last micro-batch are computed too; they attend to next to nothing.
        attended = sum(part) / micro_batch_size
        yield Rows(micro_batch_size, width, attended, num_candidates, candidate_tokens)


def rollout_batches(lengths: Sequence[int], max_groups: int) -> Iterator[tuple[int, int]]:
    """(prefixes, width) of each batch of rollouts, longest first, as ``rollout.queue.RequestQueue`` hands
    them out to an empty batch: of rollouts that all go on to their limit none joins a running one."""
    ordered = sorted(lengths, reverse=True)
    for start in range(0, len(ordered), max_groups):
        part = ordered[start : start + max_groups]
        yield len(part), part[0]
