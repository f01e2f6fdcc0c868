"""Hands out each step's samples: resumable, and the same samples whatever the data-parallel size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sip.data.samples import Stream
from megatron_sip.errors import DataError


class SampleLoader:
    """Named streams and how much of each is consumed: the counts are the whole state.

    Streams share nothing, so a step may draw any number of samples from each. Every rank holds a loader of its own and
    calls ``take`` with the same global counts.
    """

    def __init__(self, streams: Mapping[str, Stream[Any]], settings: Mapping[str, str] | None = None) -> None:
        """``settings``: flag -> value of whatever the streams' orders depend on, to name what differs at a resume."""
        self._streams = dict(streams)
        self._settings = dict(settings or {})
        self._consumed = dict.fromkeys(self._streams, 0)

    @property
    def consumed(self) -> dict[str, int]:
        """Samples consumed per stream, over all data-parallel ranks."""
        return dict(self._consumed)

    @property
    def consumed_samples(self) -> int:
        """The one count of the log: the sum over streams."""
        return sum(self._consumed.values())

    def epoch_length(self, stream: str) -> int:
        """Samples of one pass through a stream."""
        return self._streams[stream].epoch_length

    def epoch(self, stream: str) -> float:
        """How often a stream has been passed through."""
        return self._consumed[stream] / self._streams[stream].epoch_length

    def take(self, stream: str, global_count: int, dp_rank: int = 0, dp_size: int = 1) -> list[Any]:
        """This rank's part of the stream's next ``global_count`` samples, which are consumed thereby.

        The parts of all ranks, in rank order, are the global samples in stream order. A count that ``dp_size`` does not
        divide gives parts that differ by one.
        """
        samples = self.peek(stream, global_count, dp_rank, dp_size)
        self._consumed[stream] += global_count
        return samples

    def peek(self, stream: str, global_count: int, dp_rank: int = 0, dp_size: int = 1) -> list[Any]:
        """What ``take`` would return, without consuming it."""
        return self.at(stream, self._consumed[stream], global_count, dp_rank, dp_size)

    def at(self, stream: str, first: int, global_count: int, dp_rank: int = 0, dp_size: int = 1) -> list[Any]:
        """This rank's part of ``global_count`` samples from position ``first`` on, consumed before or not."""
        begin = global_count * dp_rank // dp_size
        end = global_count * (dp_rank + 1) // dp_size
        source = self._streams[stream]
        return [source[position] for position in range(first + begin, first + end)]

    def state_dict(self) -> dict[str, Any]:
        """Consumed counts, and what the orders depend on. Equal on all ranks; holds nothing of the layout."""
        return {
            "consumed": dict(self._consumed),
            "identity": {name: stream.identity for name, stream in self._streams.items()},
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ``DataError`` if the corpora, seed or sample options have changed."""
        dropped = [name for name, count in state["consumed"].items() if count and name not in self._streams]
        if dropped:
            raise DataError(
                f"the checkpoint has consumed data streams {sorted(dropped)} that this run's curriculum does not train "
                "on; resume with the same curriculum, or use --finetune to start the data anew"
            )
        for name, stream in self._streams.items():
            # A stream that the curriculum has only now begins at its first sample.
            if name in state["identity"] and int(state["identity"][name]) != stream.identity:
                raise DataError(
                    f"data stream {name!r} is not the one of the checkpoint: {self._difference(state)}; resume with "
                    "the same, or use --finetune to start the data anew"
                )
        self._consumed = {name: int(state["consumed"].get(name, 0)) for name in self._streams}

    def _difference(self, state: Mapping[str, Any]) -> str:
        """Each setting that is not as it was, with both values."""
        before = state.get("settings", {})
        changed = [
            f"{flag} is {self._settings.get(flag, 'absent')} and was {before.get(flag, 'absent')}"
            for flag in dict.fromkeys([*self._settings, *before])
            if self._settings.get(flag) != before.get(flag)
        ]
        if not before or not changed:
            return "corpora, weights, seed, --seq-length or --suffix-length differ"
        return ", ".join(changed)
