"""A judge and a rewriter of our own training, in the teacher's process: they answer as over HTTP, without a server.

For models that a CPU can run: the process sees no GPU. Larger ones are exported (tools/export_policy.py) and served.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.rollout import GenerationRequest, InProcessEngine, RolloutConfig, SamplingParameters, SeedKey
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http.config import RoleSettings
from megatron_sip.teacher.http.failures import SERVER, TOO_LONG, UNPARSABLE, Failure
from megatron_sip.teacher.http.rewriter import lead_in
from megatron_sip.teacher.http.templates import Template, load_template, prompt_digest, question_values
from megatron_sip.teacher.interfaces import JudgeIdentity, Question, Rewrite, RewriteItem, Verdict
from megatron_sip.teacher.panel import Panel
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron_sip.train.grpo.prompts import PromptEncoder
from megatron_sip.train.grpo.tasks import read_verdict, without_end
from megatron_sip.train.weights import open_model
from megatron_sip.types import Candidate, IntArray

_NAN = float("nan")
_JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ROWS = 256
"""Sequences decoded together."""


def build_model_teacher(config: TeacherConfig, tokenizer: TokenizerConfig, **options: Any) -> Panel:
    """The factory that the teacher's process calls; ``options`` as for ``build_teacher``.

    Raises ConfigurationError, CheckpointError or DataError for what is missing or does not fit.
    """
    for name in _JOB_VARIABLES:
        os.environ.pop(name, None)  # this process is a job of its own, not a rank of the run's
    torch.set_num_threads(1)
    return build_teacher(config, models=OwnModels(config, tokenizer), **options)


class Generator:
    """One checkpoint's model, its tokenizer and its sampler."""

    def __init__(self, directory: str, tokenizer: Tokenizer, context: ParallelContext) -> None:
        self.tokenizer = tokenizer
        chunks, self.name = open_model(directory, tokenizer, context)
        config = RolloutConfig(rollout_batch_size=_ROWS)
        self._engine = InProcessEngine(chunks, context, config, tokenizer.vocab_size, tokenizer.eod_id)

    def generate(
        self, prompts: Sequence[IntArray], keys: Sequence[int], counts: Sequence[int], settings: RoleSettings
    ) -> list[list[Candidate]]:
        """``counts[i]`` answers to prompt i; ``keys[i]``, a hash of it, seeds them."""
        sampling = SamplingParameters(settings.temperature, settings.top_p)
        return self._engine.generate(
            [
                GenerationRequest(key, prompt, count, settings.max_tokens, SeedKey(0, 0), sampling=sampling)
                for key, prompt, count in zip(keys, prompts, counts, strict=True)
            ]
        )


class OwnModels:
    """Judges and rewriter out of checkpoints; roles that share a checkpoint share its model."""

    def __init__(self, config: TeacherConfig, tokenizer: TokenizerConfig) -> None:
        self._config = config
        self._tokenizer = build_tokenizer(_own_tokenizer(config, tokenizer))
        self._context = initialize(ParallelConfig(), seed=0)
        self._generators: dict[str, Generator] = {}

    def judge(self, criterion: str) -> ModelJudge:
        """Raises ConfigurationError without a checkpoint."""
        config = self._config
        return ModelJudge(
            criterion,
            load_template(criterion, config.judge_prompts),
            self._generator(config.judge_checkpoint, "judge-checkpoint"),
            config.role_settings(criterion, config.judge_votes),
            config.judge_prompt_length,
        )

    def rewriter(self) -> ModelRewriter:
        """Raises ConfigurationError without a checkpoint."""
        config = self._config
        return ModelRewriter(
            load_template("rewriter", config.judge_prompts),
            self._generator(config.rewriter_checkpoint, "rewriter-checkpoint"),
            config.role_settings("rewriter", 1),
            config.judge_prompt_length,
        )

    def _generator(self, directory: str, flag: str) -> Generator:
        if not directory:
            raise ConfigurationError(f"--{flag} is not set: give what --save was of its training")
        if directory not in self._generators:
            self._generators[directory] = Generator(directory, self._tokenizer, self._context)
        return self._generators[directory]


class ModelJudge:
    """Pairwise (quality) or pointwise (safety); a verdict depends on the prompt and the number of the vote alone."""

    def __init__(
        self, criterion: str, template: Template, generator: Generator, settings: RoleSettings, prompt_length: int
    ) -> None:
        self.criterion = criterion
        self._template = template
        self._generator = generator
        self._settings = settings
        self._encoder = PromptEncoder(generator.tokenizer, prompt_length)
        self._prompt_length = prompt_length
        self._waiting: list[tuple[Sequence[Question], asyncio.Future[list[Verdict]]]] = []

    def identity(self) -> JudgeIdentity:
        return _identity(self.criterion, self._generator, self._settings, self._prompt_length)

    def prompt_hash(self, question: Question) -> str:
        return prompt_digest(self._template.render(question_values(question)))

    async def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """Questions that are asked at the same time are answered in one batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Verdict]] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._answer_all)
        self._waiting.append((questions, future))
        return await future

    def _answer_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            verdicts = iter(self._answer([question for questions, _ in waiting for question in questions]))
            for questions, future in waiting:
                future.set_result([next(verdicts) for _ in questions])
        except Exception as error:
            # Reaches those who ask, and through them the trainer: nothing is swallowed.
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)

    def _answer(self, questions: Sequence[Question]) -> list[Verdict]:
        """Votes on one prompt become one request of as many rollouts as the highest of them needs."""
        by_prompt: dict[str, list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            by_prompt[self.prompt_hash(question)].append(index)
        verdicts = [Verdict(_NAN, failure=str(Failure(TOO_LONG, "the prompt does not fit")))] * len(questions)
        asked, prompts = [], []
        for digest, indices in by_prompt.items():
            try:
                prompts.append(
                    self._encoder.encode(self._template, question_values(questions[indices[0]]), self.criterion)
                )
                asked.append((digest, indices))
            except DataError as error:
                for index in indices:
                    verdicts[index] = Verdict(_NAN, failure=str(Failure(TOO_LONG, str(error))))
        counts = [1 + max(questions[index].vote for index in indices) for _, indices in asked]
        answers = self._generator.generate(prompts, [_key(digest) for digest, _ in asked], counts, self._settings)
        for (_, indices), rollouts in zip(asked, answers, strict=True):
            for index in indices:
                verdicts[index] = self._verdict(rollouts[questions[index].vote])
        return verdicts

    def _verdict(self, answer: Candidate) -> Verdict:
        tokenizer = self._generator.tokenizer
        text = tokenizer.decode(without_end(answer, tokenizer.eod_id))
        score = read_verdict(self.criterion, answer, tokenizer)
        if np.isnan(score):
            return Verdict(score, text, str(Failure(UNPARSABLE, "no verdict before the end of the answer")))
        return Verdict(score, text)


class ModelRewriter:
    """Greedy or sampled, as ``--judge-settings rewriter.temperature`` says."""

    def __init__(self, template: Template, generator: Generator, settings: RoleSettings, prompt_length: int) -> None:
        self._template = template
        self._generator = generator
        self._settings = settings
        self._encoder = PromptEncoder(generator.tokenizer, prompt_length)
        self._prompt_length = prompt_length

    def identity(self) -> JudgeIdentity:
        return _identity("rewriter", self._generator, self._settings, self._prompt_length)

    def prompt_hash(self, item: RewriteItem) -> str:
        return prompt_digest(self._template.render(_rewriter_values(item)))

    async def rewrite(self, items: Sequence[RewriteItem]) -> list[Rewrite]:
        rewrites = [Rewrite(None, failure=str(Failure(TOO_LONG, "the prompt does not fit")))] * len(items)
        indices, prompts, keys = [], [], []
        for index, item in enumerate(items):
            values = _rewriter_values(item)
            try:
                prompts.append(self._encoder.encode(self._template, values, f"sample {item.sample_id}"))
            except DataError as error:
                rewrites[index] = Rewrite(None, failure=str(Failure(TOO_LONG, str(error))))
                continue
            indices.append(index)
            keys.append(_key(self.prompt_hash(item)))
        answers = self._generator.generate(prompts, keys, [1] * len(prompts), self._settings)
        for index, prompt, (answer,) in zip(indices, prompts, answers, strict=True):
            rewrites[index] = self._read(items[index], prompt, answer)
        return rewrites

    def _read(self, item: RewriteItem, prompt: IntArray, answer: Candidate) -> Rewrite:
        tokenizer = self._generator.tokenizer
        text = tokenizer.decode_continuation(prompt, without_end(answer, tokenizer.eod_id))
        if not text.strip():
            return Rewrite(None, failure=str(Failure(SERVER, "empty text")))
        if text.strip() == item.suffix.text.strip():
            return Rewrite(item.suffix.text, copied=True)
        return Rewrite(text)


def _identity(role: str, generator: Generator, settings: RoleSettings, prompt_length: int) -> JudgeIdentity:
    sampling = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "prompt_length": prompt_length,
    }
    return JudgeIdentity(f"model-{role}", generator.name, json.dumps(sampling, sort_keys=True))


def _rewriter_values(item: RewriteItem) -> Mapping[str, str]:
    start = lead_in(item.prefix.text)
    return {"prefix": item.prefix.text, "suffix": item.suffix.text, "lead_in": start}


def _key(digest: str) -> int:
    """63 bits of a hash: the address of an answer's random numbers."""
    return int(digest[:16], 16) >> 1


def _own_tokenizer(config: TeacherConfig, run: TokenizerConfig) -> TokenizerConfig:
    if not config.judge_tokenizer_model:
        return run
    return dataclasses.replace(
        run,
        tokenizer_type=config.judge_tokenizer_type or run.tokenizer_type,
        tokenizer_model=config.judge_tokenizer_model,
        vocab_size=None,
    )
