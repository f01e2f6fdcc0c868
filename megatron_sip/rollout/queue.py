"""Requests that wait for room in the batch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sip.rollout.protocol import GenerationRequest


class RequestQueue:
    """Hands out requests of like prefix length together, longest first, for low padding; greedy and sampled ones apart.

    Being longest first, a batch that is refilled never has to hold more prefix tokens per prefix than it began with.
    """

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._requests = requests
        self._waiting = sorted(
            (index for index, request in enumerate(requests) if request.num_rollouts > 0),
            key=lambda index: (_sampling_class(requests[index]), -len(requests[index].prefix), index),
        )

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, max_rows: int, max_cached: int | None = None, beside: GenerationRequest | None = None) -> list[int]:
        """The next requests that fit together, as indices; they are no longer waiting.

        Args:
            max_rows: rows that are free; idle slots of a smaller request beside a larger one count.
            max_cached: tokens whose keys there is room for; None where the batch is empty, and then the first request
                is given whatever its size.
            beside: a request that is in the batch: others are given only if they are sampled alike.
        """
        taken: list[int] = []
        for index in self._waiting:
            request = self._requests[index]
            first = beside or (self._requests[taken[0]] if taken else request)
            if _sampling_class(first) != _sampling_class(request):
                break
            group = [self._requests[other] for other in (*taken, index)]
            if cache_rows(group) > max_rows and (taken or max_cached is not None):
                break
            if max_cached is not None and cached_tokens(group) > max_cached:
                break
            taken.append(index)
        del self._waiting[: len(taken)]
        return taken


def cache_rows(requests: Sequence[GenerationRequest]) -> int:
    """Rows of a rectangle that holds all rollouts of the requests."""
    return len(requests) * max(request.num_rollouts for request in requests)


def cached_tokens(requests: Sequence[GenerationRequest]) -> int:
    """Tokens whose keys and values such a rectangle holds: prefixes once, new tokens for each row."""
    width = max(len(request.prefix) for request in requests)
    return len(requests) * width + cache_rows(requests) * max(request.max_new_tokens for request in requests)


def _sampling_class(request: GenerationRequest) -> tuple[bool, tuple[float, float, int]]:
    sampling = request.sampling
    return request.greedy, (sampling.temperature, sampling.top_p, sampling.top_k) if sampling else (-1.0, 0.0, 0)
