"""Rollouts from vLLM servers, which get the policy's weights after every step, or every M steps."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import RolloutError
from megatron_sip.huggingface.config_json import config_of
from megatron_sip.model.presets import Architecture
from megatron_sip.rollout.config import RolloutConfig
from megatron_sip.rollout.protocol import GenerationRequest
from megatron_sip.rollout.random import token_uniforms
from megatron_sip.rollout.vllm.direct import DirectTransfer
from megatron_sip.rollout.vllm.files import WeightFiles
from megatron_sip.rollout.vllm.fitting import Needs
from megatron_sip.rollout.vllm.links import link_of
from megatron_sip.rollout.vllm.servers import Answer, VllmServers
from megatron_sip.rollout.vllm.stream import ModelStream
from megatron_sip.rollout.vllm.transfer import FileTransfer, WeightTransfer
from megatron_sip.rollout.vllm.weights import StageWeights
from megatron_sip.teacher.http.failures import Failure
from megatron_sip.types import Candidate, CandidateKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Round:
    """What came of asking once."""

    found: dict[int, list[Candidate]]
    """By request, without those that other weights have answered."""
    problem: str = ""
    """What ends the run."""
    lost: bool = False
    """Whether a request had no answer of a server that may come back."""
    stale: bool = False
    """Whether a server answered with other weights."""


class VllmEngine:
    """A RolloutEngine on servers of its own.

    The leader of each replica asks, and its replica hears what came of it; the leader of the first one also brings the
    servers up to date. A candidate's version is the one that its server says: answers of other weights than those last
    handed over are asked for again, after the server that gave them (one that was restarted, say) was brought up to
    date. A rollout depends on its seed and its weights, and on its batch by rounding alone.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        context: ParallelContext,
        config: RolloutConfig,
        architecture: Architecture,
        vocab_size: int,
        eod: int,
    ) -> None:
        """``chunks``: as from ``build_model``; ``vocab_size``: the tokenizer's, without padding."""
        self._context = context
        self._config = config
        self._vocab_size = vocab_size
        self._eod = eod
        self._weights = StageWeights(chunks, context, architecture, vocab_size)
        dtype = next(chunks[0].parameters()).dtype
        model_config = config_of(architecture, vocab_size, dtype, None, eod)
        self._needs = Needs(vocab_size, self._weights.is_tied, model_config, config.rollout_weight_transfer)
        self._servers = VllmServers(config, context.dp_rank) if context.is_leader else None
        self._transfer = self._transfer_of(config, model_config)
        self._run = context.broadcast_from_rank_zero(secrets.token_hex(4))
        """Part of a version's name: another run's weights are never taken for this one's."""
        self._current = -1
        """Version of the trainer's weights; -1 before the first are handed over."""
        self._version = -1
        """Of the servers' weights."""

    def sync_weights(self, version: int) -> None:
        """To be called on all ranks after each change of the weights: hands them over if it is time.

        Raises:
            RolloutError: no server took them, or they could not be written; on all ranks.
        """
        self._current = version
        if self._version >= 0 and 0 <= version - self._version < self._config.rollout_sync_interval:
            return
        self._hand_over()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Candidate]]:
        """The rollouts of each request, in order, equal on all ranks of the replica. To be called on all replicas.

        While no server answers, the ranks wait for one and say so, for at most --rollout-give-up-s.

        Raises:
            RolloutError: a request has no answer by then, or one of no use; on all ranks of the replica.
        """
        candidates: list[list[Candidate]] = [[] for _ in requests]
        waiting = [index for index, request in enumerate(requests) if request.num_rollouts > 0]
        deadline = time.monotonic() + self._config.rollout_give_up_s
        are_fresh = False
        while True:
            own = None if self._servers is None else self._round(self._servers, requests, waiting, are_fresh, deadline)
            answered = self._context.broadcast_object(own)
            for index, group in answered.found.items():
                candidates[index] = group
            waiting = [index for index in waiting if index not in answered.found]
            if not self._context.any_rank(answered.lost or answered.stale):
                break
            # A server is lost, or lost its weights: all ranks hand the present ones over, whichever replica met it.
            self._hand_over()
            are_fresh = not answered.lost  # else one may have been restarted since
        if answered.problem:
            raise RolloutError(answered.problem)
        return candidates

    def close(self) -> None:
        """Ends connections and removes the files."""
        self._transfer.close()
        if self._servers is not None:
            self._servers.close()

    def _transfer_of(self, config: RolloutConfig, model_config: Mapping[str, Any]) -> WeightTransfer:
        context, servers = self._context, self._servers
        first = servers if context.rank == 0 else None
        if config.rollout_weight_transfer == "files":
            files = WeightFiles(self._weights, context, Path(config.rollout_weights_folder), model_config)
            return FileTransfer(files, first, context, config.rollout_sync_timeout_s)
        link = link_of(config.rollout_weight_transfer, context.device, config.rollout_sync_timeout_s)
        stream = ModelStream(self._weights, context)
        return DirectTransfer(stream, link, first, context, config.rollout_sync_timeout_s)

    def _hand_over(self) -> None:
        self._check_servers()  # those that are new, or were not there before
        self._weights.complete()
        own: tuple[str, Sequence[str]] = ("", ())
        if self._context.dp_rank == 0:
            own = (self._transfer.hand_over(self._name(self._current)), self._transfer.left_behind)
        problem, left_behind = self._context.broadcast_from_rank_zero(own)
        if problem:
            raise RolloutError(problem)
        if self._servers is not None:
            self._servers.leave_out(left_behind)
        self._version = self._current

    def _name(self, version: int) -> str:
        """As servers know it."""
        return f"{version}-{self._run}"

    def _check_servers(self) -> None:
        """The first replica's leader before it hands over, the others' in turn: they learn the longest sequence."""
        problem = ""
        if self._servers is not None:
            try:
                self._servers.check(self._needs)
            except RolloutError as error:
                problem = str(error)
        problems = self._context.gather_over_data_parallel(self._context.broadcast_object(problem))
        problem = next(filter(None, problems), "")
        if problem:
            raise RolloutError(problem)

    def _round(
        self,
        servers: VllmServers,
        requests: Sequence[GenerationRequest],
        waiting: Sequence[int],
        are_fresh: bool,
        deadline: float,
    ) -> _Round:
        """Asks once for all that wait. ``are_fresh``: the servers were brought up to date for these requests."""
        try:
            for index in waiting:
                self._check_length(requests[index], servers.longest)
            return self._ask(servers, requests, waiting, are_fresh, deadline)
        except RolloutError as error:
            return _Round({}, str(error))

    def _ask(
        self,
        servers: VllmServers,
        requests: Sequence[GenerationRequest],
        waiting: Sequence[int],
        are_fresh: bool,
        deadline: float,
    ) -> _Round:
        answers = servers.ask([self._body(requests[index]) for index in waiting])
        found, stale, lost = {}, set(), None
        for index, answer in zip(waiting, answers, strict=True):
            if isinstance(answer, Failure):
                if not answer.transient or time.monotonic() >= deadline:
                    raise RolloutError(f"a rollout request had no answer after all attempts: {answer}")
                lost = answer
                continue
            others = {version for one in answer for version in one.versions} - {self._name(self._version)}
            stale |= others
            if not others:
                found[index] = self._candidates(requests[index], answer)
        if stale and are_fresh and not lost:
            raise RolloutError(
                f"a rollout server answers with weights {', '.join(sorted(stale))} in place of "
                f"{self._name(self._version)}, also after they were handed over again: does another run use the same "
                "--rollout-endpoints?"
            )
        if lost is not None:
            logger.warning(
                "%d of %d rollout requests have no answer; asking again for %.0f s at most (--rollout-give-up-s): %s",
                len(waiting) - len(found), len(waiting), deadline - time.monotonic(), lost,
            )  # fmt: skip
        return _Round(found, lost=lost is not None, stale=bool(stale))

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        """Names every parameter that a server could have defaults of its own for."""
        sampling = request.sampling or self._config.sampling
        greedy = request.greedy or sampling.greedy
        parameters: dict[str, Any] = {
            "n": 1 if greedy else request.num_rollouts,  # copies of one; vLLM refuses to make them
            "max_tokens": request.max_new_tokens,
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": 1.0 if greedy else sampling.top_p,
            "top_k": 0 if greedy else sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
            "detokenize": False,
            "ignore_eos": True,  # what the server takes for the end; ours is named below
            "stop_token_ids": [self._eod] if self._config.rollout_stop_at_eod else [],
        }
        if not greedy:
            parameters["seed"] = _seed(request)  # vLLM numbers the n from here
        return {"token_ids": np.asarray(request.prefix).tolist(), "sampling_params": parameters}

    def _check_length(self, request: GenerationRequest, longest: int) -> None:
        length = len(request.prefix) + request.max_new_tokens
        if length > longest:  # vLLM would cut the rollout short without a word
            raise RolloutError(
                f"a prefix of {len(request.prefix)} tokens and {request.max_new_tokens} new ones are more than the "
                f"{longest} of a rollout server: start it with --max-model-len {length} or more"
            )

    def _candidates(self, request: GenerationRequest, answer: Answer) -> list[Candidate]:
        greedy = len(answer) == 1
        if not greedy and len(answer) != request.num_rollouts:
            raise RolloutError(f"a rollout server gave {len(answer)} continuations for {request.num_rollouts}")
        found = []
        for number in range(request.num_rollouts):
            one = answer[0 if greedy else number]
            if not one.ended and len(one.tokens) != request.max_new_tokens:
                raise RolloutError(
                    f"a rollout server ended a rollout after {len(one.tokens)} of {request.max_new_tokens} tokens"
                )
            if len(one.tokens) and one.tokens.max() >= self._vocab_size:
                raise RolloutError(f"a rollout server sampled token {one.tokens.max()} of {self._vocab_size}")
            found.append(
                Candidate(
                    kind=CandidateKind.ROLLOUT,
                    tokens=one.tokens.copy(),
                    rollout=number,
                    sampling_log_probs=one.log_probs.copy(),
                    weight_version=self._version,
                )
            )
        return found


def _seed(request: GenerationRequest) -> int:
    """53 bits that are a function of the run's seed, the step and the sample."""
    key = request.seed_key
    return int(token_uniforms(key.seed, key.step, request.sample_id, 0, 1)[0, 0] * 2**53)
