"""The only place where parts of different packages are wired together."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.checkpoint import (
    CheckpointManager,
    ModelIdentity,
    StopDecision,
    StopSignals,
    StopWatch,
    identity_of,
)
from megatron_sip.curriculum import Curriculum
from megatron_sip.curriculum.config import STREAMS
from megatron_sip.data.build import NEXT_TOKEN, SUFFIX, build_loader
from megatron_sip.data.loader import SampleLoader
from megatron_sip.distributed import ParallelContext, memory_metrics, synchronize
from megatron_sip.engine.engine import Engine
from megatron_sip.model import PolicyModel, build_model, count_parameters, training_flops_per_token
from megatron_sip.objectives import AgainstSampling, build_judged_objective
from megatron_sip.observability.run_info import write_run_info
from megatron_sip.observability.throughput import throughput_scalars
from megatron_sip.observability.timers import Timers
from megatron_sip.rollout import RolloutEngine
from megatron_sip.rollout.in_process import InProcessEngine
from megatron_sip.rollout.vllm.engine import VllmEngine
from megatron_sip.teacher import TeacherProcess
from megatron_sip.tokenizer import Tokenizer, build_tokenizer
from megatron_sip.train.checks import check_layout, reference_policy, trains_on, uses_judge, uses_rewriter
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.fill import FillRule, recorded_fills
from megatron_sip.train.lookahead import Lookahead
from megatron_sip.train.pending import PendingState
from megatron_sip.train.prepare import Preparer, StepShape
from megatron_sip.train.record import RunRecord
from megatron_sip.train.start import passes_of, repetition, start_line
from megatron_sip.train.step import StepRunner
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.train.teacher_start import await_servers, diagnosis, start_process
from megatron_sip.train.trainer import Schedule, Trainer
from megatron_sip.train.validation import Validation
from megatron_sip.train.verdicts import PauseRule, VerdictDesk
from megatron_sip.train.weights import carry_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """The model with its tokenizer and rollout engine: what training and evaluation share."""

    tokenizer: Tokenizer
    chunks: list[PolicyModel]
    rollouts: InProcessEngine
    identity: ModelIdentity


def build_policy(config: TrainConfig, context: ParallelContext) -> Policy:
    """Tokenizer, model and in-process rollouts of this rank."""
    tokenizer = build_tokenizer(config.tokenizer)
    chunks = build_model(config.model, tokenizer.vocab_size, context)
    rollouts = InProcessEngine(chunks, context, config.rollout, tokenizer.vocab_size, tokenizer.eod_id)
    identity = identity_of(config.model.resolve(), tokenizer.vocab_size, tokenizer.fingerprint)
    return Policy(tokenizer, chunks, rollouts, identity)


def build_rollouts(config: TrainConfig, context: ParallelContext, policy: Policy, stack: ExitStack) -> RolloutEngine:
    """The rollout engine of a training run; ``stack`` ends what it holds open."""
    if config.rollout.rollout_engine == "in_process":
        return policy.rollouts
    tokenizer = policy.tokenizer
    engine = VllmEngine(
        policy.chunks, context, config.rollout, config.model.resolve(), tokenizer.vocab_size, tokenizer.eod_id
    )
    stack.callback(engine.close)
    return engine


def step_shape(config: TrainConfig, tokenizer: Tokenizer) -> StepShape:
    """Sizes that every step shares."""
    parallel = config.parallel
    return StepShape(
        micro_batch_size=config.training.micro_batch_size,
        rollout_micro_batch_size=config.training.judged_micro_batch_size,
        suffix_length=config.data.suffix_length,
        rollout_length=config.rollout.rollout_max_new_tokens or config.data.suffix_length,
        pad_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        masked_eod_id=tokenizer.eod_id if config.data.eod_mask_loss else None,
        eod_id=tokenizer.eod_id,
        seed=config.training.seed,
    )


def http_roles(config: TrainConfig) -> dict[str, int]:
    """Roles of the run that servers are asked for, with their votes; none in a replay."""
    if config.teacher.replay_judgments:
        return {}
    return config.teacher.http_roles(uses_judge(config), uses_rewriter(config))


def start_teacher(config: TrainConfig, tokenizer: Tokenizer, context: ParallelContext) -> TeacherProcess | None:
    """The replica's teacher process, on its leader, if the run asks anything of one."""
    if not (uses_judge(config) or uses_rewriter(config)):
        return None
    if roles := http_roles(config):
        await_servers(config.teacher, roles, context, logger.warning if context.rank == 0 else _say_nothing)
    return start_process(
        config.teacher,
        config.tokenizer,
        tokenizer,
        context,
        judging=uses_judge(config),
        rewriting=uses_rewriter(config),
        seed=config.training.seed,
    )


def _say_nothing(text: str) -> None:
    """Of the ranks that print nothing."""


@contextmanager
def build_trainer(config: TrainConfig, context: ParallelContext, signals: StopSignals) -> Iterator[Trainer]:
    """All parts of a run; what they hold open is closed at the end, however it comes."""
    with ExitStack() as stack:
        parts = _build_parts(config, context, signals, stack)
        curriculum = check_layout(config, context.world_size)
        _say_what_starts(config, context, curriculum, parts)
        pending = PendingState(
            parts.preparer, parts.link, parts.loader, context, parts.shape.eod_id, _row_sizes(config)
        )
        yield Trainer(
            schedule=Schedule(
                config.training.train_iters, config.training.eval_interval, config.training.probe_interval
            ),
            context=context,
            engine=parts.engine,
            loader=parts.loader,
            curriculum=curriculum,
            queue=Lookahead(
                parts.preparer,
                curriculum,
                parts.loader,
                pending,
                config.training.lookahead,
                config.training.train_iters,
                draw_ahead=config.training.rewrite_lookahead if uses_rewriter(config) else 0,
            ),
            runner=_runner(config, context, parts),
            teacher=parts.link,
            validation=_validation(config, context, parts),
            checkpoints=parts.checkpoints,
            record=parts.record,
            timers=parts.timers,
            decide_stop=parts.decide_stop,
            describe_throughput=_throughput(config, context, parts.policy.tokenizer.vocab_size),
        )


def _say_what_starts(config: TrainConfig, context: ParallelContext, curriculum: Curriculum, parts: _Parts) -> None:
    if context.rank != 0:
        return
    size = count_parameters(config.model.resolve(), parts.policy.tokenizer.vocab_size)
    parts.record.message(start_line(config, curriculum, (context.tp_size, context.pp_size, context.dp_size), size))
    samples = {name: parts.loader.epoch_length(name) for name in _streams(config)}
    passes = passes_of(config.training.train_iters, curriculum, samples)
    if warning := repetition(passes, samples):
        parts.record.message(f"WARNING: {warning}")


@dataclass(frozen=True)
class _Parts:
    """What several parts of a run are made of."""

    policy: Policy
    rollouts: RolloutEngine
    shape: StepShape
    timers: Timers
    record: RunRecord
    decide_stop: Callable[[], StopDecision | None]
    link: TeacherLink
    desk: VerdictDesk
    engine: Engine
    loader: SampleLoader
    preparer: Preparer
    checkpoints: CheckpointManager


def _build_parts(config: TrainConfig, context: ParallelContext, signals: StopSignals, stack: ExitStack) -> _Parts:
    """``stack`` closes what they hold open."""
    policy = build_policy(config, context)
    tokenizer, shape = policy.tokenizer, step_shape(config, policy.tokenizer)
    timers = Timers(lambda: synchronize(context.device))
    watch = StopWatch(signals, config.checkpoint.exit_duration_in_mins)
    record = RunRecord(config.observability, tokenizer.decode, config.training.train_iters, context.rank == 0)
    link = TeacherLink(
        start_teacher(config, tokenizer, context),
        tokenizer,
        context,
        timers,
        config.data.suffix_length,
        config.teacher.judge_timeout_s,
        decide_stop=lambda: watch.decide(context),
        say=record.message,
        diagnose=lambda: diagnosis(config.teacher, http_roles(config)) if context.rank == 0 else "",
    )
    stack.callback(link.close)
    objective = dataclasses.replace(config.objective, reference_policy=reference_policy(config))
    engine = Engine(policy.chunks, config.engine, objective, context, config.training.train_iters)
    rollouts = build_rollouts(config, context, policy, stack)
    loader = build_loader(config.data, config.data.data_path, tokenizer, config.training.seed, _streams(config))
    rule = PauseRule(config.training.judge_pause_failure_rate, config.training.judge_pause_window)
    desk = VerdictDesk(link, context, rule, record.message)
    preparer = Preparer(
        rollouts=rollouts,
        teacher=link,
        verdicts=desk,
        loader=loader,
        context=context,
        shape=shape,
        pool=config.rollout.pool,
        needs_judge=config.preference.needs_judge,
        timers=timers,
    )
    stack.callback(record.close)
    if context.rank == 0 and config.observability.run_dir is not None:
        _write_run_info(config, context, tokenizer.vocab_size)
    checkpoints = CheckpointManager(config.checkpoint, context, policy.identity)
    carry_tokenizer(config.checkpoint, config.tokenizer, context)
    stack.callback(checkpoints.close)
    return _Parts(
        policy=policy,
        rollouts=rollouts,
        shape=shape,
        timers=timers,
        record=record,
        decide_stop=lambda: watch.decide(context),
        link=link,
        desk=desk,
        engine=engine,
        loader=loader,
        preparer=preparer,
        checkpoints=checkpoints,
    )


def _runner(config: TrainConfig, context: ParallelContext, parts: _Parts) -> StepRunner:
    return StepRunner(
        engine=parts.engine,
        rollouts=parts.rollouts,
        verdicts=parts.desk,
        loader=parts.loader,
        context=context,
        shape=parts.shape,
        pool=config.rollout.pool,
        preference=config.preference,
        objective=AgainstSampling(build_judged_objective(config.objective), config.rollout.rollout_importance_cap),
        fill=_fill_rule(config, context),
        early_reference=config.training.reference_scoring == "early",
        timers=parts.timers,
    )


def _fill_rule(config: TrainConfig, context: ParallelContext) -> FillRule:
    training = config.training
    fills = training.on_late_judgment == "fill"
    return FillRule(
        round_windows=context.dp_size * training.micro_batch_size,
        max_windows=int(training.late_fill_limit * training.global_batch_size) if fills else 0,
        recorded=recorded_fills(Path(training.replay_fills)) if training.replay_fills else None,
    )


def _row_sizes(config: TrainConfig) -> dict[str, int]:
    """Stream -> rows of its micro-batches."""
    sizes = config.training.stream_micro_batch_sizes
    return {stream: sizes.get(stream, sizes["default"]) for stream in STREAMS}


def _streams(config: TrainConfig) -> list[str]:
    """The data streams that the run draws from: documents may be too short for one that it does not use."""
    suffixes = any(trains_on(config, stream) for stream in ("suffix", "rewrite", "rollout"))
    windows = trains_on(config, "ntp") or config.training.on_late_judgment == "fill"
    return [NEXT_TOKEN] * windows + [SUFFIX] * suffixes


def _validation(config: TrainConfig, context: ParallelContext, parts: _Parts) -> Validation | None:
    if not config.data.valid_data_path:
        return None
    names = [NEXT_TOKEN, SUFFIX] if uses_judge(config) else [NEXT_TOKEN]
    tokenizer = parts.policy.tokenizer
    loader = build_loader(config.data, config.data.valid_data_path, tokenizer, config.training.seed, names)
    return Validation(
        engine=parts.engine,
        preparer=parts.preparer,
        teacher=parts.link,
        loader=loader,
        context=context,
        shape=parts.shape,
        preference=config.preference,
        num_windows=config.training.eval_iters * config.training.global_batch_size,
        num_probes=config.training.probe_samples,
    )


def _throughput(
    config: TrainConfig, context: ParallelContext, vocab_size: int
) -> Callable[[int, float], Mapping[str, float]]:
    architecture = config.model.resolve()
    flops_per_token = training_flops_per_token(architecture, vocab_size, config.data.seq_length)
    peak = config.observability.peak_tflops

    def describe(num_tokens: int, seconds: float) -> dict[str, float]:
        rates = throughput_scalars(num_tokens, seconds, flops_per_token, context.world_size, peak)
        return {**rates, **memory_metrics(context.device)}

    return describe


def _write_run_info(config: TrainConfig, context: ParallelContext, vocab_size: int) -> None:
    facts: dict[str, Any] = {
        "parameters": count_parameters(config.model.resolve(), vocab_size),
        "ranks": context.world_size,
        "layout": f"TP {context.tp_size} x PP {context.pp_size} x DP {context.dp_size}",
        "device": str(context.device),
        "cores": os.cpu_count(),
    }
    assert config.observability.run_dir is not None
    write_run_info(config.observability.run_dir, dataclasses.asdict(config), facts, config.rollout.pool.chance)
