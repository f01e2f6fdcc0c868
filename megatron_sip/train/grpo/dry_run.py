"""``--dry-run`` of a training of the teacher: sizes, memory, batches and verdicts, without a device.

Batches and parameters are exact, tokens and verdicts the most there can be, bytes as exact as ``train.estimate`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sip.data.config import parse_blend
from megatron_sip.model.presets import count_parameters, padded_vocab_size
from megatron_sip.train.dry_run_report import render_memory, render_missing, render_model
from megatron_sip.train.estimate import BYTES_FP32, Layout, Precision, Workload, rank_memory
from megatron_sip.train.grpo.checks import find_missing
from megatron_sip.train.grpo.config import GRPORunConfig
from megatron_sip.train.sizes import Sizes, device_of, layout_of, precision_of, vocabulary_size


@dataclass(frozen=True)
class GRPODryRun(Sizes):
    """The figures of the report."""

    train_iters: int
    prompts: int
    """Of a step, over all replicas; as the next four."""
    answers: int
    updates: int
    micro_batches: int
    """Of one update on one replica, if every group has something to teach."""
    step_tokens: int
    """Tokens through forward and backward at most, passes counted; a prompt counts once for its answers."""
    measured: int
    """Held-out answers of one measurement; 0 without."""
    measurements: int
    verdicts_per_answer: int
    """Votes on a rewrite of an unsafe suffix; 0 for a judge, which is rewarded by labels."""
    num_examples: int | None
    """Lines of --train-data; None if they are not at hand."""

    @property
    def passes(self) -> float | None:
        """Times that the run sees each example."""
        return self.train_iters * self.prompts / self.num_examples if self.num_examples else None


def dry_run(config: GRPORunConfig, task: str, environment: Mapping[str, str]) -> tuple[str, bool]:
    """The report, and whether the run could start here. ``environment`` may hold ``WORLD_SIZE``."""
    smallest = str(config.parallel.model_parallel_size)
    run = examine(config, task, config.task.dry_run_world_size or int(environment.get("WORLD_SIZE", smallest)))
    return render(run), run.is_ready


def examine(config: GRPORunConfig, task: str, world_size: int) -> GRPODryRun:
    """Work out what ``config`` does on ``world_size`` ranks. Raises ConfigurationError if it cannot work there."""
    config.check_layout(world_size)
    missing = find_missing(config, task)
    options, teacher, arch = config.task, config.teacher, config.model.resolve()
    vocab_size, layout = (
        vocabulary_size(config.tokenizer, missing),
        layout_of(config.parallel, arch.num_layers, world_size),
    )
    rows = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by, layout.tp)
    precision, work = precision_of(config.model, config.engine), _workload(config, layout, rows)
    stages = tuple(rank_memory(arch, layout, precision, work, stage) for stage in range(layout.pp))
    on_host = config.grpo.needs_reference and config.grpo.reference_placement == "host"
    device_bytes, device_words, device_note = device_of(options.dry_run_device_gib, world_size)
    measures = bool(options.valid_data) and options.eval_interval > 0
    held_out = _num_examples(options.valid_data, "--valid-data", missing)
    row = options.prompt_length + options.generations * config.answer_length
    return GRPODryRun(
        architecture=arch,
        preset=config.model.preset,
        vocab_size=vocab_size,
        vocab_rows=rows,
        world_size=world_size,
        layout=layout,
        num_parameters=count_parameters(arch, vocab_size),
        stages=stages,
        # The reference, and the policy while the reference is swapped in (engine.reference).
        host_bytes=max(
            stage.parameters * (_reference_bytes(config, precision) + precision.weight) for stage in stages
        ) * on_host,
        device_bytes=device_bytes,
        device_words=device_words,
        device_note=device_note,
        missing=tuple(missing),
        train_iters=options.train_iters,
        prompts=options.global_batch_size,
        answers=options.global_batch_size * options.generations,
        updates=options.updates_per_step,
        micro_batches=work.micro_batches,
        step_tokens=options.global_batch_size * row * options.batch_passes,
        measured=min(options.eval_samples, held_out or options.eval_samples) * options.eval_generations * measures,
        # Before the first step, at every interval, and after the last.
        measurements=(1 + -(-options.train_iters // options.eval_interval)) if measures else 0,
        verdicts_per_answer=teacher.votes_of("quality") + teacher.votes_of("safety") if task == "rewriter" else 0,
        num_examples=_num_examples(options.train_data, "--train-data", missing),
    )  # fmt: skip


def _workload(config: GRPORunConfig, layout: Layout, vocab_rows: int) -> Workload:
    options = config.task
    prompts = options.global_batch_size // layout.dp
    answers = options.generations * config.answer_length
    micro_batches = -(-prompts // options.mini_batches // options.micro_batch_size)
    at_once = min(prompts, max(1, config.rollout.rollout_batch_size // options.generations))
    on_device = config.grpo.reference_placement == "device"
    return Workload(
        micro_batch_tokens=options.micro_batch_size * (options.prompt_length + answers),
        scored_positions=options.micro_batch_size * answers,
        vocab_rows=vocab_rows,
        micro_batches=micro_batches,
        full_recompute=config.model.recompute_granularity == "full",
        cached_tokens=at_once * (options.prompt_length + answers),
        decode_rows=at_once * options.generations,
        reference_weight_bytes=_reference_bytes(config, precision_of(config.model, config.engine)) if on_device else 0,
    )


def _reference_bytes(config: GRPORunConfig, precision: Precision) -> int:
    """Bytes per weight of the reference, wherever it is; a moving average is kept in fp32."""
    if not config.grpo.needs_reference:
        return 0
    return BYTES_FP32 if config.grpo.reference_policy == "ema" else precision.weight


def _num_examples(values: Sequence[str], flag: str, missing: Sequence[str]) -> int | None:
    if any(line.startswith(flag) for line in missing):
        return None
    # Here: it reads the files.
    from megatron_sip.data.lines import LinesDataset

    return sum(len(LinesDataset(path)) for path in parse_blend(values, flag)[0])


def render(run: GRPODryRun) -> str:
    """The report as text."""
    return "\n".join([*render_model(run), *render_memory(run), *_render_step(run), *render_missing(run)]) + "\n"


def _render_step(run: GRPODryRun) -> list[str]:
    replicas = "the one replica" if run.layout.dp == 1 else f"each of {run.layout.dp} replicas"
    lines = [
        "Each step",
        f"  {run.prompts:>11,} prompts: {run.prompts // run.layout.dp} on {replicas}",
        f"  {run.answers:>11,} answers",
        f"  {run.updates:>11,} {'update' if run.updates == 1 else 'updates'} of {run.micro_batches} micro-batches a "
        "replica, if all groups have spread",
        f"  {run.step_tokens:>11,} tokens through forward and backward, at most",
    ]
    if run.verdicts_per_answer:
        most = run.answers * run.verdicts_per_answer
        lines.append(f"  {most:>11,} verdicts if all suffixes are unsafe: {run.verdicts_per_answer} on each answer")
    lines.append(f"  {run.train_iters:,} steps in all")
    if run.passes is not None:
        lines.append(f"  {run.num_examples:,} examples: {run.passes:.3g} passes over them")
    if run.measured:
        lines.append(f"  {run.measurements:,} measurements of {run.measured:,} held-out answers each")
    return [*lines, ""]
