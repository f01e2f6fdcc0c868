"""``--dry-run``: what a configuration would do on a cluster, worked out without a device or a process group.

``examine`` computes, ``dry_run_report.render`` prints. Parameter counts, batches and judge calls are exact; bytes are
as exact as ``train.estimate`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_sip.curriculum import Curriculum, TriggerState
from megatron_sip.data.build import build_loader
from megatron_sip.model.presets import count_parameters, padded_vocab_size
from megatron_sip.teacher.schedule import num_comparisons
from megatron_sip.tokenizer import build_tokenizer
from megatron_sip.train.checks import check_layout, find_missing, reference_policy, trains_on
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.dry_run_report import render
from megatron_sip.train.estimate import BYTES_FP32, Layout, Precision, Workload, rank_memory
from megatron_sip.train.sizes import Sizes, device_of, layout_of, precision_of, vocabulary_size
from megatron_sip.train.start import passes_of


@dataclass(frozen=True)
class JudgeCalls:
    """Questions to the judge for one step, all replicas together."""

    groups: int
    pairs_per_group: int
    """Comparisons of two candidates, for quality."""
    pointwise_per_group: int
    """Questions about one candidate, for safety and factuality."""
    votes: int
    """Answers to each question; twice as many for pairs that are shown in both orders."""
    pair_votes: int

    @property
    def total(self) -> int:
        """Verdicts of a step."""
        return self.groups * (self.pairs_per_group * self.pair_votes + self.pointwise_per_group * self.votes)


@dataclass(frozen=True)
class PhaseFigures:
    """One phase of the curriculum once its ramp is over."""

    name: str
    steps: int | None
    counts: Mapping[str, int]
    """Stream -> samples of a step."""
    micro_batches: Mapping[str, int]
    """Stream -> micro-batches of a step on one replica."""
    tokens: int
    """Tokens through forward and backward in a step, at most; a row's prefix counts once."""
    rollouts: int
    judge: JudgeCalls
    rewrites: int


@dataclass(frozen=True)
class DryRun(Sizes):
    """The figures of the report."""

    phases: tuple[PhaseFigures, ...]
    train_iters: int
    corpus_samples: Mapping[str, int]
    """"ntp" windows and "sip" prefix-suffix samples of one pass over the corpus, where known."""
    passes: Mapping[str, float]
    """The same streams -> passes over the corpus in the whole run."""


def dry_run(config: TrainConfig, environment: Mapping[str, str]) -> tuple[str, bool]:
    """The report of ``--dry-run``, and whether the run could start here.

    ``environment`` may hold ``WORLD_SIZE``. Raises ConfigurationError.
    """
    smallest = config.parallel.model_parallel_size
    world_size = config.training.dry_run_world_size or int(environment.get("WORLD_SIZE", str(smallest)))
    run = examine(config, world_size)
    return render(run), run.is_ready


def examine(config: TrainConfig, world_size: int) -> DryRun:
    """Work out what ``config`` does on ``world_size`` ranks.

    Raises:
        ConfigurationError: it cannot work there, or the vocabulary's size is not known.
        DataError: a corpus or a tokenizer that is at hand is broken.
    """
    curriculum = check_layout(config, world_size)
    missing = find_missing(config)
    arch, vocab_size = config.model.resolve(), vocabulary_size(config.tokenizer, missing)
    layout = layout_of(config.parallel, arch.num_layers, world_size)
    rows = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by, layout.tp)
    phases = tuple(_phases(config, curriculum, layout.dp))
    precision, work = precision_of(config.model, config.engine), _workload(config, layout, phases, rows)
    stages = tuple(rank_memory(arch, layout, precision, work, stage) for stage in range(layout.pp))
    on_host = reference_policy(config) != "none" and config.objective.reference_placement == "host"
    samples = _corpus_samples(config, missing)
    device_bytes, device_words, device_note = device_of(config.training.dry_run_device_gib, world_size)
    return DryRun(
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
        phases=phases,
        train_iters=config.training.train_iters,
        corpus_samples=samples,
        passes=passes_of(config.training.train_iters, curriculum, samples),
        missing=tuple(missing),
    )  # fmt: skip


def judge_calls(config: TrainConfig, groups: int) -> JudgeCalls:
    """Questions for ``groups`` judged groups, each with all the candidates of the pool."""
    teacher, kinds = config.teacher, [kind.value for kind in config.rollout.pool.kinds]
    pairs = 0
    if teacher.judge_quality_weight > 0:
        pairs = num_comparisons(teacher.pair_schedule, len(kinds), teacher.pair_budget)
    pointwise = sum(weight > 0 for weight in (teacher.judge_safety_weight, teacher.judge_factuality_weight))
    return JudgeCalls(
        groups=groups if config.preference.needs_judge else 0,
        pairs_per_group=pairs * (2 if teacher.judge_coherence_weight > 0 else 1),
        pointwise_per_group=pointwise * len(kinds),
        votes=teacher.judge_votes,
        pair_votes=teacher.judge_votes * (2 if teacher.pair_order == "both" else 1),
    )


def _reference_bytes(config: TrainConfig, precision: Precision) -> int:
    """Bytes per weight of the reference, wherever it is; a moving average is kept in fp32 (engine.reference)."""
    policy = reference_policy(config)
    return {"none": 0, "ema": BYTES_FP32}.get(policy, precision.weight)


def _workload(config: TrainConfig, layout: Layout, phases: tuple[PhaseFigures, ...], vocab_rows: int) -> Workload:
    data, training, pool = config.data, config.training, config.rollout.pool
    tokens = positions = 0
    for stream in ("ntp", "suffix", "rewrite", "rollout"):
        if trains_on(config, stream):
            rows = training.micro_batch_size if stream == "ntp" else training.judged_micro_batch_size
            tokens = max(tokens, rows * _row_length(config, stream))
            scored = data.seq_length if stream == "ntp" else _row_candidates(config, stream) * data.suffix_length
            positions = max(positions, rows * scored)
    # A batch of rollouts is no larger than what one replica has to generate in a step.
    judged = max((phase.counts.get("rollout", 0) // layout.dp for phase in phases), default=0)
    prefixes = min(judged, max(1, config.rollout.rollout_batch_size // max(pool.num_rollouts, 1)))
    generates = any(phase.rollouts for phase in phases)
    new_tokens = config.rollout.rollout_max_new_tokens or data.suffix_length
    cached = prefixes * (data.max_prefix_length + pool.num_rollouts * new_tokens)
    on_device = config.objective.reference_placement == "device"
    return Workload(
        micro_batch_tokens=tokens,
        scored_positions=positions,
        vocab_rows=vocab_rows,
        micro_batches=max((count for phase in phases for count in phase.micro_batches.values()), default=1),
        full_recompute=config.model.recompute_granularity == "full",
        cached_tokens=cached if generates else 0,
        decode_rows=prefixes * pool.num_rollouts if generates else 0,
        reference_weight_bytes=_reference_bytes(config, precision_of(config.model, config.engine)) if on_device else 0,
    )


def _row_candidates(config: TrainConfig, stream: str) -> int:
    """Candidates in a training row of a stream; 0 for a next-token row."""
    return {"ntp": 0, "rollout": config.preference.num_candidates}.get(stream, 1)


def _row_length(config: TrainConfig, stream: str) -> int:
    """Longest row of a stream, in tokens."""
    data = config.data
    if stream == "ntp":
        return data.seq_length
    return data.max_prefix_length + _row_candidates(config, stream) * data.suffix_length


def _phases(config: TrainConfig, curriculum: Curriculum, dp: int) -> Iterator[PhaseFigures]:
    pool, training = config.rollout.pool, config.training
    start, opened = 0, dict[str, int]()
    for phase in curriculum.phases:
        if start >= training.train_iters:
            return  # it is never reached
        # A phase that waits is taken to open at the first moment.
        opened[phase.name] = start
        plan = curriculum.plan(start + phase.ramp, TriggerState(opened))
        judged = plan.counts["rollout"]
        sizes = training.stream_micro_batch_sizes
        micro = {s: n // (dp * sizes.get(s, sizes["default"])) for s, n in plan.counts.items() if n}
        yield PhaseFigures(
            name=phase.name,
            steps=_steps_of(phase.steps, training.train_iters - start),
            counts={stream: count for stream, count in plan.counts.items() if count},
            micro_batches=micro,
            tokens=sum(count * _row_length(config, stream) for stream, count in plan.counts.items()),
            rollouts=judged * pool.num_rollouts,
            judge=judge_calls(config, judged),
            rewrites=plan.counts["rewrite"] + (judged if pool.rewrite else 0),
        )
        start += phase.steps or 0


def _steps_of(steps: int | None, left: int) -> int | None:
    """Steps of a phase of which ``left`` are still to come; None: to the end."""
    return None if steps is None else min(steps, left)


def _corpus_samples(config: TrainConfig, missing: list[str]) -> dict[str, int]:
    """Samples of one pass per stream, read from the corpus, or as --dry-run-corpus-samples says."""
    given = config.training.dry_run_corpus_samples
    if given is not None:
        return {"sip": given}
    if any(line.startswith(("--data-path", "--tokenizer")) for line in missing):
        return {}
    names = [name for name, used in (("ntp", trains_on(config, "ntp")), ("sip", _uses_suffixes(config))) if used]
    tokenizer = build_tokenizer(config.tokenizer)
    loader = build_loader(config.data, config.data.data_path, tokenizer, config.training.seed, names)
    for name in names:
        loader.take(name, 1)
    return {name: round(1 / loader.epoch(name)) for name in names}


def _uses_suffixes(config: TrainConfig) -> bool:
    return any(trains_on(config, stream) for stream in ("suffix", "rewrite", "rollout"))
