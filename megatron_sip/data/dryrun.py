"""What a filter would do, seen on a sample: nothing is tokenized and nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sip.data.filters import DocumentFilter
from megatron_sip.data.preprocess import PreprocessConfig
from megatron_sip.data.readers import expand_inputs, read_file
from megatron_sip.data.records import BrokenLine, parse_batch

_MAX_FILES = 32
_MAX_SHOWN = 5


@dataclass
class DryRun:
    """Where the sampled lines would go: ``num_lines`` = kept + blank + broken + all of ``dropped``."""

    num_files: int = 0
    num_lines: int = 0
    num_kept: int = 0
    num_blank: int = 0
    num_broken: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Beginnings of the first texts that each rule dropped, and of those kept (key ``kept``)."""
    errors: list[str] = field(default_factory=list)


def dry_run(config: PreprocessConfig, num_lines: int) -> DryRun:
    """Apply the filter to about ``num_lines`` lines: the first ones of up to 32 files spread evenly over the input."""
    # No tokenizer is needed, so none is asked for.
    config.read.validate()
    paths = _spread(expand_inputs(config.inputs))
    keep = DocumentFilter(config.filters)
    result = DryRun(num_files=len(paths), dropped={name: 0 for name, _ in keep.rules})
    for number, path in enumerate(paths):
        share = (num_lines * (number + 1)) // len(paths) - (num_lines * number) // len(paths)
        _sample(path, share, config, keep, result)
    return result


def _spread(paths: Sequence[Path]) -> list[Path]:
    count = min(len(paths), _MAX_FILES)
    return [paths[index * len(paths) // count] for index in range(count)]


def _sample(path: Path, num_lines: int, config: PreprocessConfig, keep: DocumentFilter, result: DryRun) -> None:
    end = result.num_lines + num_lines
    for batch in read_file(path, config.reading):
        for item in parse_batch(batch, config.json_keys, config.reading):
            if result.num_lines >= end:
                return
            result.num_lines += 1
            if item is None:
                result.num_blank += 1
                continue
            try:
                rule = keep(item) if not isinstance(item, BrokenLine) else None
                message = item.message if isinstance(item, BrokenLine) else None
            except ValueError as error:
                rule, message = None, str(error)
            if message is not None or isinstance(item, BrokenLine):
                result.num_broken += 1
                result.errors.append(f"{path}:{item.number}: {message}")
                continue
            if rule is None:
                result.num_kept += 1
            else:
                result.dropped[rule] += 1
            shown = result.examples.setdefault(rule or "kept", [])
            if len(shown) < _MAX_SHOWN:
                shown.append(" ".join(item.texts[0][:300].split())[:160])
