"""Examples of JSON-lines files as a dataset: an index of offsets in memory, the lines themselves on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_sip.data.config import parse_blend
from megatron_sip.data.order import mix
from megatron_sip.data.samples import BlendedStream, ShuffledStream, Stream
from megatron_sip.errors import DataError


@dataclass(frozen=True)
class Example:
    """One line."""

    sample_id: int
    """Position in the run's deterministic stream."""
    where: str
    """File and line, for messages."""
    record: Mapping[str, Any]


class LinesDataset:
    """The lines of a file, one example each; every line is read when it is asked for. Raises ``DataError``."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._starts, self._size = _line_starts(self._path)
        if not len(self._starts):
            raise DataError(f"{path}: has no line; make it with tools/make_judge_data.py")
        self.identity = mix(self._size, len(self._starts))

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, index: int, epoch: int, sample_id: int) -> Example:
        """Line ``index``, the same in every epoch. Raises ``DataError`` for one that is no JSON object."""
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._size
        with self._path.open("rb") as stream:
            stream.seek(start)
            line = stream.read(end - start)
        where = f"{self._path}:{index + 1}"
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{where}: no JSON ({error}); make the file again") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: {type(record).__name__} in place of an object; make the file again")
        return Example(sample_id, where, record)


def line_streams(values: Sequence[str], seed: int, flag: str) -> Stream[Example]:
    """The shuffled, endless stream of files in Megatron's notation of a blend. Raises ``DataError``."""
    paths, weights = parse_blend(values, flag)
    streams: list[Stream[Example]] = [
        ShuffledStream[Example](LinesDataset(path), mix(seed, number)) for number, path in enumerate(paths)
    ]
    if len(streams) == 1:
        return streams[0]
    # Without weights every line counts alike.
    return BlendedStream(streams, weights or [stream.epoch_length for stream in streams])


def _line_starts(path: Path) -> tuple[NDArray[np.int64], int]:
    """Offsets of the lines that are not empty, and the file's size."""
    starts, offset = [], 0
    try:
        with path.open("rb") as stream:
            for line in stream:
                if line.strip():
                    starts.append(offset)
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); make it with tools/make_judge_data.py") from error
    return np.array(starts, dtype=np.int64), offset
