"""Two checkpoints on unseen prefixes (tools/evaluate.py): generates with one, then with the other; judges compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megatron_sip.data.build import SUFFIX, build_loader
from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import DataError
from megatron_sip.evaluation import Evaluation, EvaluationConfig, evaluate, generate_all
from megatron_sip.evaluation.compare import Continuations
from megatron_sip.evaluation.paired import Judge
from megatron_sip.observability.progress import Progress
from megatron_sip.observability.timers import Timers
from megatron_sip.teacher import TeacherProcess
from megatron_sip.train.build import Policy, build_policy
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.train.weights import load_weights
from megatron_sip.types import CandidateGroup, Judgment, Sample


def compare_policies(options: EvaluationConfig, config: TrainConfig, context: ParallelContext) -> Evaluation:
    """Generates with one policy, then with the other in the same model, then judges."""
    policy = build_policy(config, context)
    samples = _take_samples(options, config, policy, context)
    decodings = options.decodings(config.data.suffix_length, config.training.seed)

    def continuations(directory: str, step: int | None) -> dict[str, Continuations]:
        load_weights(policy.chunks, policy.identity, directory, step, context)
        progress = Progress(f"continue with {directory}", len(samples) * len(decodings), "continuations")
        advance = progress.advance if context.rank == 0 else _say_nothing
        return generate_all(policy.rollouts, samples, decodings, advance)

    # The judges first: one that cannot be loaded is found before the long work.
    with _open_judges(options, config, policy, context) as judges:
        ours = continuations(options.checkpoint, options.checkpoint_step)
        theirs = continuations(options.baseline, options.baseline_step)
        seed, cut = config.training.seed, options.cut_to_shorter
        return evaluate(samples, ours, theirs, judges, context, options.confidence, seed, cut)


def _say_nothing(count: int) -> None:
    """Progress of the ranks that print none."""


@contextmanager
def _open_judges(
    options: EvaluationConfig, config: TrainConfig, policy: Policy, context: ParallelContext
) -> Iterator[dict[str, Judge]]:
    """The training's judge and, if given, the second, by the names of their models. Neither learns here."""
    # A judge over HTTP is named as its server knows it, an embedded one by its file.
    over_http = config.teacher.teacher == "http"
    models = [options.judge or (config.teacher.judge_served_model if over_http else config.teacher.judge_model)]
    if options.second_judge is not None:
        models.append(options.second_judge)
    own = {"tokenizer_fingerprint": policy.tokenizer.fingerprint, "rewriting": False}
    own |= {"replica": context.dp_rank, "num_replicas": context.dp_size}
    with ExitStack() as stack:
        judges: dict[str, Judge] = {}
        for number, model in enumerate(models, start=1):
            teacher = dataclasses.replace(config.teacher, judge_model=model)
            if over_http:
                teacher = dataclasses.replace(config.teacher, judge_served_model=model)
            link = TeacherLink(
                TeacherProcess(teacher, own) if context.is_leader else None,
                policy.tokenizer,
                context,
                Timers(),
                config.data.suffix_length,
                teacher.judge_timeout_s,
            )
            stack.callback(link.close)
            judges[f"{number}: {model.rsplit('/')[-1].removesuffix('.npz') or 'judge'}"] = _ask(link)
        yield judges


def _ask(link: TeacherLink) -> Judge:
    """A judge that leaves its running statistics as they are."""

    def judge(groups: Sequence[CandidateGroup]) -> Sequence[Judgment]:
        return link.collect_groups(link.submit_groups(groups, learn=False)).judgments

    return judge


def _take_samples(
    options: EvaluationConfig, config: TrainConfig, policy: Policy, context: ParallelContext
) -> list[Sample]:
    """This replica's part of the prefixes."""
    seed = config.training.seed
    loader = build_loader(config.data, config.data.test_data_path, policy.tokenizer, seed, names=(SUFFIX,))
    samples: list[Sample] = loader.take(SUFFIX, options.num_prefixes, context.dp_rank, context.dp_size)
    if loader.epoch(SUFFIX) > 1.0:
        available = int(options.num_prefixes / loader.epoch(SUFFIX))
        raise DataError(f"--num-prefixes {options.num_prefixes}: the test corpus has {available}, so give at most that")
    return samples
