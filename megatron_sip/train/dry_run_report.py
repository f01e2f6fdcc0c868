"""The figures of ``--dry-run`` as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sip.train.start import REPETITION, STREAM_NAMES, repetition

if TYPE_CHECKING:
    from megatron_sip.train.dry_run import DryRun, PhaseFigures
    from megatron_sip.train.sizes import Sizes

_STREAM_NAMES = {"ntp": "next-token windows", "suffix": "suffixes", "rewrite": "rewrites", "rollout": "judged groups"}


def render(run: DryRun) -> str:
    """The report as text of at most 100 columns, but for paths."""
    lines = [
        *render_model(run), *render_memory(run), *_render_batch(run), *_render_corpus(run), *render_missing(run)
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def render_model(run: Sizes) -> list[str]:
    """The architecture, its vocabulary, and how ranks split it."""
    arch, layout = run.architecture, run.layout
    virtual = f", {layout.virtual_stages} virtual stages per rank" if layout.virtual_stages > 1 else ""
    ranks = f"{run.world_size} {'rank' if run.world_size == 1 else 'ranks'}"
    return [
        "Model",
        f"  {run.preset}: {arch.num_layers} layers, hidden {arch.hidden_size}, {arch.num_attention_heads} heads, "
        f"{arch.num_query_groups} key-value groups, FFN {arch.ffn_hidden_size}",
        f"  vocabulary {run.vocab_size:,}, padded to {run.vocab_rows:,}",
        f"  {run.num_parameters:,} parameters without the padding",
        f"  {ranks} = tensor {layout.tp} x pipeline {layout.pp} x data {layout.dp}{virtual}",
        "",
    ]


def render_memory(run: Sizes) -> list[str]:
    """Bytes of the ranks of each stage, and whether they fit."""
    lines = ["Memory of a rank, GiB (the last four and the peak are estimates without fragmentation)"]
    heads = [
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "reference",
        "activ.",
        "logits",
        "cache",
        "peak",
    ]
    widths = [5, 13, 8, 9, 9, 9, 7, 7, 7, 7]
    lines.append("  " + " ".join(head.rjust(width) for head, width in zip(heads, widths, strict=True)))
    for stage in run.stages:
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.reference, stage.activations, stage.logits,
                 stage.kv_cache, stage.peak)  # fmt: skip
        cells = [str(stage.stage), f"{stage.parameters:,}", *(f"{part / 2**30:.2f}" for part in parts)]
        lines.append("  " + " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    if run.peak <= 0.9 * run.device_bytes:
        verdict = "fits"
    elif run.fits:
        verdict = "is close to the limit: fragmentation may not leave room"
    else:
        verdict = (
            "does NOT fit: lower the micro-batch sizes or --rollout-batch-size, give --recompute-granularity full or "
            "--reference-placement host, or raise tensor or pipeline parallel"
        )
    lines.append(f"  {run.peak / 2**30:.1f} GiB on {run.device_words} {verdict}")
    if run.device_note:
        lines.append(f"  ({run.device_note})")
    if run.host_bytes:
        lines.append(f"  pinned host memory for the reference: {run.host_bytes / 2**30:.2f} GiB a rank")
    return [*lines, ""]


def _render_batch(run: DryRun) -> list[str]:
    lines = ["Each step"]
    for phase in run.phases:
        lines += _render_phase(phase, run.layout.dp)
    return [*lines, f"  {run.train_iters:,} steps in all", ""]


def _render_phase(phase: PhaseFigures, dp: int) -> list[str]:
    steps = f"{phase.steps:,} steps" if phase.steps is not None else "to the end"
    lines = [f"  phase {phase.name!r} ({steps})"]
    replicas = "the one replica" if dp == 1 else f"each of {dp} replicas"
    for stream, count in phase.counts.items():
        micro = phase.micro_batches[stream]
        unit = "micro-batch" if micro == 1 else "micro-batches"
        lines.append(f"    {count:>9,} {_STREAM_NAMES[stream]}: {micro} {unit} on {replicas}")
    lines.append(f"    {phase.tokens:>9,} tokens through forward and backward, at most")
    if phase.rollouts:
        lines.append(f"    {phase.rollouts:>9,} rollouts")
    if phase.rewrites:
        lines.append(f"    {phase.rewrites:>9,} rewrites asked for")
    judge = phase.judge
    if judge.groups:
        parts = []
        if judge.pairs_per_group:
            pairs = "pair" if judge.pairs_per_group == 1 else "pairs"
            parts.append(f"{judge.pairs_per_group} {pairs} x {judge.pair_votes} votes")
        if judge.pointwise_per_group:
            parts.append(f"{judge.pointwise_per_group} pointwise x {judge.votes} votes")
        lines.append(f"    {judge.total:>9,} verdicts of the judge = {judge.groups} x ({' + '.join(parts)})")
    return lines


def _render_corpus(run: DryRun) -> list[str]:
    lines = ["Corpus"]
    for name, length in run.corpus_samples.items():
        lines.append(f"  {length:,} {STREAM_NAMES[name]}: {run.passes[name]:.1f} passes")
    if repetition(run.passes, run.corpus_samples):
        lines.append(f"  WARNING: {REPETITION}")
    if not run.corpus_samples:
        lines.append("  not at hand; --dry-run-corpus-samples N gives the passes over N samples")
    return [*lines, ""]


def render_missing(run: Sizes) -> list[str]:
    """What is missing, and whether the run could start."""
    found = ["Missing on this machine", *(f"  {line}" for line in run.missing)] if run.missing else []
    if run.is_ready:
        return [*found, "Nothing is missing on this machine."]
    reasons = [f"{len(run.missing)} missing" if run.missing else "", "" if run.fits else "it does not fit"]
    return [*found, f"This run cannot start: {' and '.join(reason for reason in reasons if reason)}."]
