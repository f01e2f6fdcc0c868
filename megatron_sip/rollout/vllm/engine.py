"""Rollouts from vLLM servers, which get the policy's weights after every step, or every M steps."""

from __future__ import annotations

from collections.abc import Sequence
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
from megatron_sip.rollout.vllm.files import WeightFiles
from megatron_sip.rollout.vllm.servers import Answer, VllmServers
from megatron_sip.rollout.vllm.weights import StageWeights
from megatron_sip.teacher.http.failures import Failure
from megatron_sip.types import Candidate, CandidateKind


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
        self._tied = not architecture.untie_embeddings_and_output_weights
        self._weights = StageWeights(chunks, context, architecture, vocab_size)
        dtype = next(chunks[0].parameters()).dtype
        model_config = config_of(architecture, vocab_size, dtype, None, eod)
        self._files = WeightFiles(self._weights, context, Path(config.rollout_weights_folder), model_config)
        self._servers = VllmServers(config, context.dp_rank) if context.is_leader else None
        self._directory = Path()
        self._version = -1
        """Of the servers' weights; -1 before the first are handed over."""

    def sync_weights(self, version: int) -> None:
        """To be called on all ranks after each change of the weights: hands them over if it is time.

        Raises:
            RolloutError: no server took them, or they could not be written; on all ranks.
        """
        if self._version >= 0 and 0 <= version - self._version < self._config.rollout_sync_interval:
            return
        context = self._context
        self._weights.complete()
        directory, problem = Path(), ""
        if context.dp_rank == 0:
            directory, problem = self._files.write(version)
        if context.rank == 0 and not problem:
            problem = self._hand_over(directory, version)
        directory, problem = context.broadcast_from_rank_zero((directory, problem))
        if problem:
            raise RolloutError(problem)
        if self._version < 0:
            self._check_servers()
        self._directory, self._version = directory, version

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Candidate]]:
        """The rollouts of each request, in order, equal on all ranks of the replica.

        Raises:
            RolloutError: a request has no answer after all attempts; on all ranks of the replica.
        """
        own: tuple[list[list[Candidate]], str] = ([], "")
        if self._servers is not None:
            try:
                own = (self._ask(self._servers, requests), "")
            except RolloutError as error:
                own = ([], str(error))
        candidates, problem = self._context.broadcast_object(own)
        if problem:
            raise RolloutError(problem)
        return candidates

    def close(self) -> None:
        """Ends connections and removes the files."""
        if self._servers is not None:
            self._servers.close()
        if self._context.rank == 0:
            self._files.remove()

    def _hand_over(self, directory: Path, version: int) -> str:
        """What went wrong, or ""."""
        assert self._servers is not None
        try:
            if self._version < 0:
                self._servers.check(self._vocab_size, self._tied)
            self._servers.sync(directory, version)
        except RolloutError as error:
            return str(error)
        self._files.keep_only(directory)
        return ""

    def _check_servers(self) -> None:
        problem = ""
        if self._servers is not None and self._context.rank > 0:
            try:
                self._servers.check(self._vocab_size, self._tied)
            except RolloutError as error:
                problem = str(error)
        problem = self._context.broadcast_object(problem)
        if problem:
            raise RolloutError(problem)

    def _ask(self, servers: VllmServers, requests: Sequence[GenerationRequest]) -> list[list[Candidate]]:
        candidates: list[list[Candidate]] = [[] for _ in requests]
        waiting = [index for index, request in enumerate(requests) if request.num_rollouts > 0]
        for _ in range(2):
            for index in waiting:
                self._check_length(requests[index], servers.longest)
            answers = servers.ask([self._body(requests[index]) for index in waiting])
            stale = []
            for index, answer in zip(waiting, answers, strict=True):
                if isinstance(answer, Failure):
                    raise RolloutError(f"a rollout request had no answer after all attempts: {answer}")
                if any(version != str(self._version) for one in answer for version in one.versions):
                    stale.append((index, answer))
                else:
                    candidates[index] = self._candidates(requests[index], answer)
            if not stale:
                return candidates
            waiting = [index for index, _ in stale]
            servers.sync(self._directory, self._version, only_stale=True)
        found = sorted({version for _, answer in stale for one in answer for version in one.versions})
        raise RolloutError(
            f"a rollout server answers with weights {', '.join(found)} in place of version {self._version}, also after "
            "they were handed over again: does another run use the same --rollout-endpoints?"
        )

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
