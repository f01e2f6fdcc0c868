"""Rollouts from the training model itself: no second copy of the weights, and so no transfer of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_sip.distributed import ParallelContext, capture
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.rollout.lane import Capture, Decoding, Generated, Lane
from megatron_sip.rollout.protocol import GenerationRequest
from megatron_sip.rollout.queue import RequestQueue
from megatron_sip.rollout.sampling import VocabParallelSampler
from megatron_sip.rollout.stages import StageChain
from megatron_sip.types import Candidate, CandidateKind


class InProcessEngine:
    """A RolloutEngine on the ranks, and on the weights, that train.

    Every rank of a data-parallel replica calls ``generate`` with equal requests. Up to ``rollout_batch_size`` rows are
    decoded at a time; rows that are done leave, and waiting requests take their place. Under pipeline parallelism the
    rows are divided into as many lanes as there are stages, which are decoded in turn, so that no stage waits for a
    whole round trip. Under tensor parallelism either all ranks decode the same rows with their shares of the weights,
    or each decodes rows of its own with the whole weights (``rollout_weights``).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        context: ParallelContext,
        config: RolloutConfig,
        vocab_size: int,
        eod: int,
        capture: Capture = capture,
    ) -> None:
        """``chunks``: as from ``build_model``; ``vocab_size``: the tokenizer's, without padding; ``capture``: how a
        decode step is made into a call that repeats it."""
        self._context = context
        self._config = config
        self._chunks = chunks
        self._stages = StageChain(chunks, context, config.rollout_weights)
        group = (None, 0, 1) if self._stages.gathered else (context.tp_group, context.tp_rank, context.tp_size)
        self._decoding = Decoding(
            stages=self._stages,
            sampler=VocabParallelSampler(vocab_size, *group),
            sampling=config.sampling,
            eod=eod if config.rollout_stop_at_eod else None,
            device=context.device,
            capture=capture,
        )
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
        own = [requests[index] for index in asked]
        queue, num_lanes = RequestQueue(own), self._stages.num_in_flight
        lanes = [Lane(self._decoding, own, queue, max(1, max_rows // num_lanes)) for _ in range(num_lanes)]
        with self._stages.evaluating():
            active = list(lanes)
            while active:
                active = [lane for lane in active if lane.turn()]
            self._stages.finish()
        results = {number: rollouts for lane in lanes for number, rollouts in lane.results.items()}
        return {asked[number]: self._candidates(results[number]) for number in range(len(own))}

    def _candidates(self, rollouts: Generated) -> list[Candidate]:
        return [
            Candidate(
                kind=CandidateKind.ROLLOUT,
                tokens=tokens,
                rollout=number,
                sampling_log_probs=log_probs,
                weight_version=self._weight_version,
            )
            for number, (tokens, log_probs) in enumerate(rollouts)
        ]
