"""Rollouts from the training model itself: no second copy of the weights, and so no transfer of them.

G  prefixes of a batch    K  slots of a group    R  rows, G * K    P  width of the prefixes    T  most new tokens
n  rollouts of a batch
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from numpy.typing import NDArray

from megatron_sip.distributed import ParallelContext
from megatron_sip.rollout.batch import RolloutBatch, batch_uniforms, plan_batches
from megatron_sip.rollout.cache import RolloutCache
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.rollout.parameters import SamplingParameters
from megatron_sip.rollout.protocol import GenerationRequest
from megatron_sip.rollout.sampling import VocabParallelSampler
from megatron_sip.rollout.stages import StageChain
from megatron_sip.types import Candidate, CandidateKind


class InProcessEngine:
    """A RolloutEngine on the ranks, and on the weights, that train.

    Every rank of a data-parallel replica calls ``generate`` with equal requests. Under pipeline parallelism as many
    batches as there are stages are decoded in turn, so that no stage waits for a whole round trip. Under tensor
    parallelism either all ranks decode the same rows with their shares of the weights, or each decodes rows of its own
    with the whole weights (``rollout_weights``).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        context: ParallelContext,
        config: RolloutConfig,
        vocab_size: int,
        eod: int,
    ) -> None:
        """``chunks``: as from ``build_model``; ``vocab_size``: the tokenizer's, without padding."""
        self._context = context
        self._config = config
        self._chunks = chunks
        self._stages = StageChain(chunks, context, config.rollout_weights)
        group = (None, 0, 1) if self._stages.gathered else (context.tp_group, context.tp_rank, context.tp_size)
        self._sampler = VocabParallelSampler(vocab_size, *group)
        self._eod = eod if config.rollout_stop_at_eod else None
        self._weight_version = 0

    def sync_weights(self, version: int) -> None:
        """To be called on all ranks after each change of the weights, which are the model's own."""
        for chunk in self._chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)  # it would wait for a forward pass of the modules
        self._weight_version = version

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Candidate]]:
        """The rollouts of each request, in order, equal on all ranks of the replica."""
        candidates: list[list[Candidate]] = [[] for _ in requests]
        for index, rollouts in self._generate_share(requests).items():
            candidates[index] = rollouts
        return candidates

    def _generate_share(self, requests: Sequence[GenerationRequest]) -> dict[int, list[Candidate]]:
        asked = [index for index, request in enumerate(requests) if request.num_rollouts > 0]
        if not asked:
            return {}
        if not self._stages.gathered:
            return self._generate(requests, asked, self._config.rollout_batch_size)
        tp_rank, tp_size = self._context.tp_rank, self._context.tp_size
        asked.sort(key=lambda index: len(requests[index].prefix))  # every rank gets long and short ones
        own = self._generate(requests, asked[tp_rank::tp_size], self._config.rollout_batch_size // tp_size)
        gathered: list[dict[int, list[Candidate]]] = [{} for _ in range(self._context.host.model_parallel.size())]
        dist.all_gather_object(gathered, own, group=self._context.host.model_parallel)
        return {index: rollouts for share in gathered for index, rollouts in share.items()}

    def _generate(
        self, requests: Sequence[GenerationRequest], asked: Sequence[int], max_rows: int
    ) -> dict[int, list[Candidate]]:
        width = self._stages.num_in_flight
        plan = plan_batches([requests[index] for index in asked], max(1, max_rows // width))
        candidates: dict[int, list[Candidate]] = {}
        with self._stages.evaluating():
            for start in range(0, len(plan), width):
                picked = [[asked[index] for index in batch] for batch in plan[start : start + width]]
                runs = [self._start([requests[index] for index in batch]) for batch in picked]
                self._decode(runs)
                for batch, run in zip(picked, runs, strict=True):
                    candidates.update(zip(batch, self._collect(run), strict=True))
            self._stages.finish()
        return candidates

    def _start(self, requests: Sequence[GenerationRequest]) -> _Run:
        first = requests[0]
        sampling = first.sampling or self._config.sampling
        return _Run(
            requests,
            sampling.as_greedy() if first.greedy else sampling,
            RolloutBatch(requests, self._eod),
            self._context.device,
        )

    def _decode(self, runs: Sequence[_Run]) -> None:
        """Takes each run in turn one token further, until all are done; all stages take the same turns."""
        active = list(runs)
        while active:
            for run in list(active):
                if not self._context.is_last_stage and run.num_taken < run.num_started:
                    run.take(self._stages.broadcast_from_last(run.empty_tokens()), None)
                if run.batch.finished:
                    active.remove(run)
                    continue
                logits = run.next_logits(self._stages)
                if logits is not None:
                    tokens, log_probs = self._sampler.sample(logits, run.uniforms(), run.sampling)
                    run.take(self._stages.broadcast_from_last(tokens), log_probs)

    def _collect(self, run: _Run) -> list[list[Candidate]]:
        log_probs = self._stages.broadcast_from_last(run.log_probs()).cpu().numpy()
        candidates: list[list[Candidate]] = []
        row = 0
        for rollouts in run.batch.results():
            candidates.append([])
            for number, tokens in enumerate(rollouts):
                candidates[-1].append(
                    Candidate(
                        kind=CandidateKind.ROLLOUT,
                        tokens=tokens,
                        rollout=number,
                        sampling_log_probs=log_probs[row, : len(tokens)].copy(),
                        weight_version=self._weight_version,
                    )
                )
                row += 1
        return candidates


class _Run:
    """A batch under way on this rank: its bookkeeping and its tensors on the device."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParameters,
        batch: RolloutBatch,
        device: torch.device,
    ) -> None:
        self.batch = batch
        self.sampling = sampling
        self.num_started = 0
        """Passes begun: the first is the prefill, each yields one token per row."""
        self.num_taken = 0
        """Tokens per row taken over; on stages before the last it lags behind."""
        self._requests = requests
        self._device = device
        self._prefix_lengths = torch.from_numpy(batch.prefix_lengths).to(device)
        self._cache = RolloutCache(self._prefix_lengths, batch.num_slots, batch.max_new_tokens)
        rows = batch.rollout_of_rows
        self._num_rollouts = int(rows.max()) + 1
        numbers = batch_uniforms(requests, batch.max_new_tokens)[rows].T
        self._uniforms = torch.from_numpy(np.ascontiguousarray(numbers)).to(device)  # [T, R]
        self._tokens = torch.empty(0, dtype=torch.int64, device=device)
        self._row_lengths = self._prefix_lengths.repeat_interleave(batch.num_slots)
        self._scored: list[tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]] = []

    def next_logits(self, stages: StageChain) -> torch.Tensor | None:
        """Runs the next pass: logits [R, v] on the last stage, None elsewhere."""
        self.num_started += 1
        if self.num_started == 1:
            logits = stages.forward(*self._prefixes(), self._cache, self._prefix_lengths - 1)
            return None if logits is None else logits.repeat_interleave(self.batch.num_slots, dim=0)
        self._cache.start_decode_step()
        positions = self._row_lengths + (self.num_taken - 1)
        return stages.forward(self._tokens[None], positions[None], self._cache, None)

    def uniforms(self) -> torch.Tensor:
        """float64 [R], for the token to be drawn now."""
        return self._uniforms[self.num_taken]

    def empty_tokens(self) -> torch.Tensor:
        """int64 [R], to be received into."""
        return torch.empty(self.batch.num_rows, dtype=torch.int64, device=self._device)

    def take(self, tokens: torch.Tensor, log_probs: torch.Tensor | None) -> None:
        """Appends a token to each row (int64 [R]) and lets finished rows go."""
        if log_probs is not None:
            self._scored.append((self.batch.active_rows, self.batch.active_rollouts, log_probs))
        self._tokens = tokens
        self.num_taken += 1
        self.batch.accept(tokens.cpu().numpy())  # the one wait for the device per token
        kept = self.batch.compact()
        if kept is not None:
            self._select(*kept)

    def log_probs(self) -> torch.Tensor:
        """float32 [n, T] on the last stage; of no meaning elsewhere."""
        table = np.zeros((self._num_rollouts, self.batch.max_new_tokens), dtype=np.float32)
        if self._scored:
            sizes = [len(values) for _, _, values in self._scored]
            host = torch.cat([values for _, _, values in self._scored]).cpu().numpy()
            for position, values in enumerate(np.split(host, np.cumsum(sizes)[:-1])):
                rows, rollouts, _ = self._scored[position]
                table[rollouts, position] = values[rows]
        return torch.from_numpy(table).to(self._device)

    def _prefixes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions, int64 [G, P], padded at the right."""
        width = int(self.batch.prefix_lengths.max())
        table = np.zeros((len(self._requests), width), dtype=np.int64)
        for row, request in zip(table, self._requests, strict=True):
            row[: len(request.prefix)] = request.prefix
        tokens = torch.from_numpy(table).to(self._device)
        return tokens, torch.arange(width, device=self._device).expand_as(tokens)

    def _select(self, groups: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        old_slots = len(self._tokens) // len(self._prefix_lengths)
        rows = torch.from_numpy((groups[:, None] * old_slots + slots).ravel()).to(self._device)
        self._cache.select(torch.from_numpy(groups).to(self._device), torch.from_numpy(slots).to(self._device))
        self._prefix_lengths = torch.from_numpy(self.batch.prefix_lengths).to(self._device)
        self._row_lengths = self._row_lengths[rows]
        self._tokens = self._tokens[rows]
        self._uniforms = self._uniforms[:, rows]
