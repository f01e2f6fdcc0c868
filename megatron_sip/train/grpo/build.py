"""Wires a training of the teacher together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megatron_sip.checkpoint import CheckpointManager, StopSignals, StopWatch, identity_of
from megatron_sip.data.config import parse_blend
from megatron_sip.data.lines import LinesDataset, line_streams
from megatron_sip.data.loader import SampleLoader
from megatron_sip.distributed import ParallelContext, synchronize
from megatron_sip.engine.engine import Engine
from megatron_sip.model import build_model, count_parameters
from megatron_sip.observability.run_info import write_run_info
from megatron_sip.observability.timers import Timers
from megatron_sip.rollout import InProcessEngine
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.tokenizer import Tokenizer, build_tokenizer
from megatron_sip.train.grpo.config import GRPORunConfig
from megatron_sip.train.grpo.examples import check_examples, check_splits
from megatron_sip.train.grpo.step import GRPOShape, GRPOStep
from megatron_sip.train.grpo.tasks import JudgeTask, RewriteTask, Task
from megatron_sip.train.grpo.trainer import STREAM, GRPORecord, GRPOTrainer, Rhythm
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.train.teacher_start import start_process
from megatron_sip.train.weights import carry_tokenizer


@contextmanager
def build_grpo_trainer(
    config: GRPORunConfig, kind: str, context: ParallelContext, signals: StopSignals
) -> Iterator[GRPOTrainer]:
    """All parts of a run of ``kind`` "judge" or "rewriter"; what they hold open is closed at the end."""
    options = config.task
    with ExitStack() as stack:
        tokenizer = build_tokenizer(config.tokenizer)
        chunks = build_model(config.model, tokenizer.vocab_size, context)
        timers = Timers(lambda: synchronize(context.device))
        link = _link(config, kind, tokenizer, context, timers)
        stack.callback(link.close)
        engine = Engine(chunks, config.engine, config.grpo, context, options.train_iters * options.updates_per_step)
        rollouts = InProcessEngine(chunks, context, config.rollout, tokenizer.vocab_size, tokenizer.eod_id)
        rollouts.sync_weights(engine.num_updates)
        task = _task(config, kind, tokenizer, link)
        record = GRPORecord(config.observability, tokenizer.decode, options.train_iters, context.rank == 0)
        stack.callback(record.close)
        if context.rank == 0:
            trained = check_examples(options.train_data, "--train-data", task)
            warning = check_splits(trained, check_examples(options.valid_data, "--valid-data", task))
            if warning:
                record.message(f"WARNING: {warning}")
        if context.rank == 0 and config.observability.run_dir is not None:
            _write_run_info(config, context, tokenizer.vocab_size)
        identity = identity_of(config.model.resolve(), tokenizer.vocab_size, tokenizer.fingerprint)
        checkpoints = CheckpointManager(config.checkpoint, context, identity)
        carry_tokenizer(config.checkpoint, config.tokenizer, context)
        stack.callback(checkpoints.close)
        watch = StopWatch(signals, config.checkpoint.exit_duration_in_mins)
        yield GRPOTrainer(
            rhythm=Rhythm(
                options.train_iters,
                options.global_batch_size,
                options.eval_interval,
                min(options.eval_samples, num_held_out(options.valid_data)),
                options.eval_generations,
            ),
            context=context,
            engine=engine,
            step=GRPOStep(
                task=task,
                engine=engine,
                rollouts=rollouts,
                objective=config.grpo.build(),
                context=context,
                shape=_shape(config, tokenizer),
                timers=timers,
            ),
            parts=task.parts,
            loader=SampleLoader({STREAM: line_streams(options.train_data, options.seed, "--train-data")}),
            validation=_validation(config),
            teacher=link,
            checkpoints=checkpoints,
            record=record,
            timers=timers,
            decide_stop=lambda: watch.decide(context),
        )


def rewards_teacher(teacher: TeacherConfig) -> TeacherConfig:
    """The judges of eq. 2: quality against the suffix, and safety, whatever else a recipe asks of a teacher."""
    return dataclasses.replace(
        teacher,
        judge_quality_weight=1.0,
        judge_safety_weight=1.0,
        judge_factuality_weight=0.0,
        judge_coherence_weight=0.0,
        pair_schedule="pivot",
        pair_pivot="suffix",
    )


def _link(
    config: GRPORunConfig, kind: str, tokenizer: Tokenizer, context: ParallelContext, timers: Timers
) -> TeacherLink:
    """The rewriter's judges; a judge is rewarded by labels, and has none."""
    process = None
    if kind == "rewriter":
        teacher = rewards_teacher(config.teacher)
        seed = config.task.seed
        process = start_process(teacher, config.tokenizer, tokenizer, context, judging=True, rewriting=False, seed=seed)
    # No rewrite is ever asked for, so that no suffix has a length here.
    return TeacherLink(process, tokenizer, context, timers, config.answer_length, config.teacher.judge_timeout_s)


def _task(config: GRPORunConfig, kind: str, tokenizer: Tokenizer, link: TeacherLink) -> Task:
    length, prompts = config.task.prompt_length, config.teacher.judge_prompts
    if kind == "judge":
        return JudgeTask(tokenizer, length, prompts)
    return RewriteTask(tokenizer, length, link, prompts)


def _shape(config: GRPORunConfig, tokenizer: Tokenizer) -> GRPOShape:
    parallel = config.parallel
    return GRPOShape(
        micro_batch_size=config.task.micro_batch_size,
        generations=config.task.generations,
        answer_length=config.answer_length,
        pad_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        batch_passes=config.task.batch_passes,
        mini_batches=config.task.mini_batches,
        advantage_std=config.grpo.advantage_std,
        eod_id=tokenizer.eod_id,
        seed=config.task.seed,
    )


def _validation(config: GRPORunConfig) -> SampleLoader | None:
    if not config.task.valid_data or not config.task.eval_interval:
        return None
    return SampleLoader({STREAM: line_streams(config.task.valid_data, config.task.seed, "--valid-data")})


def num_held_out(values: Sequence[str]) -> int:
    """Lines of --valid-data: to measure more would measure some of them twice."""
    return sum(len(LinesDataset(path)) for path in parse_blend(values, "--valid-data")[0])


def _write_run_info(config: GRPORunConfig, context: ParallelContext, vocab_size: int) -> None:
    assert config.observability.run_dir is not None
    facts = {
        "parameters": count_parameters(config.model.resolve(), vocab_size),
        "ranks": context.world_size,
        "layout": f"TP {context.tp_size} x PP {context.pp_size} x DP {context.dp_size}",
        "device": str(context.device),
        "cores": os.cpu_count(),
    }
    write_run_info(config.observability.run_dir, dataclasses.asdict(config), facts)
