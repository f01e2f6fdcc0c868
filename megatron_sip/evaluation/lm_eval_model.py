"""A policy as an ``LM`` of lm-evaluation-harness, spread over tensor-, pipeline- and data-parallel ranks.

Every rank runs the harness on the same tasks and gives the same answers; inside, each data-parallel replica computes a
share of the batches. Needs ``pip install lm_eval``, which nothing else here does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import ConfigurationError
from megatron_sip.evaluation.scoring import PolicyScorer, plan_batches
from megatron_sip.rollout.protocol import GenerationRequest, RolloutEngine, SeedKey
from megatron_sip.rollout.sampling import SamplingParameters
from megatron_sip.tokenizer import Tokenizer

_MAX_NEW_TOKENS = 256  # the harness's own default
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts


class MegatronLM(TemplateLM):
    """Answers the harness's three kinds of requests as its backend ``hf`` does for the exported policy.

    Probabilities are over the tokenizer's tokens, as in training and rollouts. ``hf`` on a model whose embedding has
    more rows than the tokenizer has tokens (Qwen's) counts those rows in its softmax too.

    Args:
        scorer: log-probs of the policy.
        rollouts: generates from the same policy.
        tokenizer: the policy's.
        context: of the job.
        max_length: longest sequence in tokens; longer contexts lose their beginning.
        batch_tokens: tokens of a forward pass, padding included.
    """

    def __init__(
        self,
        scorer: PolicyScorer,
        rollouts: RolloutEngine,
        tokenizer: Tokenizer,
        context: ParallelContext,
        max_length: int,
        batch_tokens: int = 16384,
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._rollouts = rollouts
        self._tokenizer = tokenizer
        self._context = context
        self._max_length = max_length
        self._batch_tokens = batch_tokens
        self._begin = tokenizer.encode("")
        """What the tokenizer puts before every text."""

    @property
    def eot_token_id(self) -> int:
        """End of document."""
        return self._tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the begin token if there is one, else end of document."""
        return self._begin[0] if self._begin else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with what the tokenizer puts first unless ``add_special_tokens`` is False."""
        ids = self._tokenizer.encode(string)
        if add_special_tokens is False and self._begin and ids[: len(self._begin)] == self._begin:
            return ids[len(self._begin) :]
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of each whole text, cut into windows of ``max_length`` that do not overlap."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append(window)
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(windows, with_best=False), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of each context up to the first of its stop strings; greedy without ``temperature``."""
        asked = [
            self._generation(number, context, options)
            for number, (context, options) in enumerate(request.args for request in requests)
        ]
        plan = plan_batches([len(item.prefix) + item.max_new_tokens for item in asked], self._batch_tokens)
        texts: dict[int, str] = {}
        for batch in self._own(plan):
            chosen = [asked[index] for index in batch]
            for item, (candidate,) in zip(chosen, self._rollouts.generate(chosen), strict=True):
                kept = candidate.tokens[candidate.tokens != self.eot_token_id]
                text = self._tokenizer.decode_continuation(item.prefix, kept)
                texts[item.sample_id] = cut(text, _stops(requests[item.sample_id].args[1]))
        texts = self._gather(texts)
        return [texts[number] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests], with_best=True)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], with_best: bool) -> list[tuple[float, bool]]:
        """Log-prob of each continuation after its context, and whether it is what greedy decoding gives."""
        plan = plan_batches([len(context) + len(continuation) for context, continuation in pairs], self._batch_tokens)
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._own(plan):
            answers = self._scorer.continuations([pairs[index] for index in batch], self._max_length, with_best)
            found.update(zip(batch, answers, strict=True))
        found = self._gather(found)
        return [found[number] for number in range(len(pairs))]

    def _generation(self, number: int, context: str, options: Mapping[str, Any]) -> GenerationRequest:
        length = int(next((options[name] for name in _LENGTH_NAMES if options.get(name) is not None), _MAX_NEW_TOKENS))
        if length >= self._max_length:
            raise ConfigurationError(
                f"a task asks for {length} new tokens, and sequences are at most {self._max_length} tokens long: "
                "set max_gen_toks in the task."
            )
        prefix = self.tok_encode(context)[-(self._max_length - length) :] or [self.prefix_token_id]
        temperature = 0.0 if options.get("do_sample") is False else float(options.get("temperature") or 0.0)
        sampling = SamplingParameters(temperature, float(options.get("top_p") or 1.0), int(options.get("top_k") or 0))
        return GenerationRequest(number, _array(prefix), 1, length, SeedKey(0, 0), sampling=sampling)

    def _own(self, plan: list[list[int]]) -> list[list[int]]:
        return plan[self._context.dp_rank :: self._context.dp_size]

    def _gather(self, own: dict[int, Any]) -> dict[int, Any]:
        return {key: value for share in self._context.gather_over_data_parallel(own) for key, value in share.items()}


def cut(text: str, stops: Sequence[str]) -> str:
    """``text`` before the first of the stop strings."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def _stops(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _array(ids: list[int]) -> Any:
    return torch.tensor(ids, dtype=torch.int64).numpy()
