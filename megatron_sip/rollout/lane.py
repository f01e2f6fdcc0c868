"""A batch that is decoded on this rank: blocks of rows join when there is room, and leave when they are done.

R  rows of all blocks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_sip.rollout.block import Block
from megatron_sip.rollout.cache import JointCache
from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.rollout.protocol import GenerationRequest
from megatron_sip.rollout.queue import RequestQueue, cached_tokens
from megatron_sip.rollout.sampling import VocabParallelSampler
from megatron_sip.rollout.stages import StageChain

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""Makes a function of fixed tensors into one that repeats its kernels; see ``distributed.capture``."""

_REFILL_SHARE = 0.25
"""Of the rows, to be free before others join: each join is a prefill, and a block of attention of its own from then."""
_PASSES_BEFORE_CAPTURE = 3
"""Libraries make their workspaces in the first passes; and a shape that is gone by then is not worth a graph."""

Generated = list[tuple[NDArray[np.int64], NDArray[np.float32]]]


@dataclass(frozen=True)
class Decoding:
    """What all lanes share."""

    stages: StageChain
    sampler: VocabParallelSampler
    sampling: SamplingParameters
    """Of requests that name none."""
    eod: int | None
    """The token that ends a rollout; None to go on to the limit."""
    device: torch.device
    capture: Capture

    def sampling_of(self, request: GenerationRequest) -> SamplingParameters:
        """How the request's tokens are drawn."""
        sampling = request.sampling or self.sampling
        return sampling.as_greedy() if request.greedy else sampling


class Lane:
    """Up to ``max_rows`` rows. All stages of a pipeline make the same calls in the same order."""

    def __init__(
        self, decoding: Decoding, requests: Sequence[GenerationRequest], queue: RequestQueue, max_rows: int
    ) -> None:
        self._decoding = decoding
        self._requests = requests
        self._queue = queue
        self._max_rows = max_rows
        self._max_cached = 0
        self._blocks: list[Block] = []
        self._step: _DecodeStep | None = None
        self._tokens = torch.empty(0, dtype=torch.int64, device=decoding.device)
        """int64 [R], the last token of each row."""
        self._pending: list[Block] = []
        """Blocks of a pass whose tokens have not come yet."""
        self.results: dict[int, Generated] = {}
        """Of requests that are done, by their number."""

    def turn(self) -> bool:
        """Takes over the tokens of the pass before and starts the next one; False if there is nothing left to do."""
        stages = self._decoding.stages
        if self._pending:
            self._take(stages.broadcast_from_last(self._awaited()), None)
        joined = self._join()
        if joined is None and not self._blocks:
            return False
        if joined is not None:
            drawn = self._prefill(joined)
        else:
            self._pending = list(self._blocks)
            if self._step is None:
                self._step = _DecodeStep(self._decoding, self._blocks, self._sampling(self._blocks[0]), self._tokens)
            drawn = self._step.run()
        if drawn is not None:
            self._take(stages.broadcast_from_last(drawn[0]), drawn[1])
        return True

    def _join(self) -> Block | None:
        rows = sum(block.batch.num_rows for block in self._blocks)
        if not self._blocks:
            numbers = self._queue.take(self._max_rows)
        elif self._max_rows - rows >= _REFILL_SHARE * self._max_rows:
            room = self._max_cached - sum(block.cache.num_cached_tokens for block in self._blocks)
            numbers = self._queue.take(self._max_rows - rows, room, beside=self._requests[self._blocks[0].numbers[0]])
        else:
            return None
        if not numbers:
            return None
        requests = [self._requests[number] for number in numbers]
        self._max_cached = max(self._max_cached, cached_tokens(requests))
        return Block(requests, numbers, self._decoding.device)

    def _prefill(self, block: Block) -> tuple[torch.Tensor, torch.Tensor] | None:
        self._pending = [block]
        logits = block.prefill(self._decoding.stages)
        if logits is None:
            return None
        return self._decoding.sampler.sample(logits, block.uniforms(), self._sampling(block))

    def _take(self, tokens: torch.Tensor, log_probs: torch.Tensor | None) -> None:
        """Appends a token to each row of the pending blocks; ``log_probs``: None on stages before the last."""
        pending, self._pending = self._pending, []
        joined = pending[0] not in self._blocks
        if log_probs is None:
            log_probs = torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
        if joined or self._step is None or not self._step.records:
            record_all(pending, tokens, log_probs)
        eod = self._decoding.eod
        ended = None if eod is None else (tokens == eod).cpu().numpy()  # the one wait for the device per token
        remaining, changed, start = [], joined, 0
        others = [self._tokens] if joined else []
        for block in pending:
            part = slice(start, start + block.batch.num_rows)
            start = part.stop
            kept = block.advance(None if ended is None else ended[part])
            if block.batch.finished:
                self._finish(block)
                changed = True
                continue
            changed = changed or kept is not None
            remaining.append(block)
            others.append(tokens[part] if kept is None else tokens[part][kept])
        self._blocks = [*self._blocks, *remaining] if joined else remaining
        if changed:
            self._step = None
            self._tokens = torch.cat(others) if others else tokens[:0]
        else:
            self._tokens = tokens

    def _finish(self, block: Block) -> None:
        for number, rollouts in zip(block.numbers, block.results(self._decoding.stages), strict=True):
            self.results[number] = rollouts

    def _sampling(self, block: Block) -> SamplingParameters:
        return self._decoding.sampling_of(self._requests[block.numbers[0]])

    def _awaited(self) -> torch.Tensor:
        """int64 [R] to receive the pending tokens into: the step's own, if it was a decode step."""
        if self._step is not None and self._pending[0] in self._blocks:
            return self._step.tokens
        rows = sum(block.batch.num_rows for block in self._pending)
        return torch.empty(rows, dtype=torch.int64, device=self._decoding.device)


class _DecodeStep:
    """One more token for every row of some blocks, as a function of fixed tensors.

    On a GPU a few hundred short kernels are launched per token: where nothing has to be sent on between stages and
    nothing is looked up on the host, they are captured once the shapes have stood for some passes, and repeated.
    """

    def __init__(
        self, decoding: Decoding, blocks: Sequence[Block], sampling: SamplingParameters, tokens: torch.Tensor
    ) -> None:
        self._decoding = decoding
        self._blocks = list(blocks)
        self._sampling = sampling
        self.tokens = tokens.clone()
        """int64 [R]: the last ones when a step begins, the new ones after it."""
        self._log_probs = torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
        self._plan = JointCache([block.cache for block in blocks])
        self.records = decoding.stages.is_alone
        """Whether a step writes down its tokens itself; in a pipeline they have to be sent round first."""
        self._captures = decoding.stages.is_capturable and sampling.top_p == 1.0  # a nucleus is looked for on the host
        self._widths: list[int] = []
        self._num_passes = 0
        self._call = self._compute

    def run(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Tokens int64 [R] and log-probs float32 [R] on the last stage; None elsewhere."""
        widths = [block.own_width for block in self._blocks]
        if widths != self._widths:
            self._widths, self._num_passes, self._call = widths, 0, self._compute
        self._num_passes += 1
        if self._captures and self._num_passes == _PASSES_BEFORE_CAPTURE + 1:
            self._call = self._decoding.capture(self._compute, self._decoding.device)
        self._call()
        return (self.tokens, self._log_probs) if self._decoding.stages.is_last else None

    def _compute(self) -> None:
        positions = torch.cat([block.start_decode_step() for block in self._blocks])
        logits = self._decoding.stages.forward(self.tokens[None], positions[None], self._plan, None)
        if logits is None:
            return
        uniforms = torch.cat([block.uniforms() for block in self._blocks])
        tokens, log_probs = self._decoding.sampler.sample(logits, uniforms, self._sampling)
        self.tokens.copy_(tokens)
        self._log_probs.copy_(log_probs)
        if self.records:
            record_all(self._blocks, self.tokens, self._log_probs)


def record_all(blocks: Sequence[Block], tokens: torch.Tensor, log_probs: torch.Tensor) -> None:
    """``Block.record`` for rows of several blocks, one after the other."""
    sizes = [block.batch.num_rows for block in blocks]
    for block, own, values in zip(blocks, tokens.split(sizes), log_probs.split(sizes), strict=True):
        block.record(own, values)
