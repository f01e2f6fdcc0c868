"""The figures of ``tools/plan.py`` as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_sip.train.plan.budget import Budget, PhaseBudget
from megatron_sip.train.plan.parts import Part

_HEADS = f"  {'part':22} {'TFLOP':>10} {'GB':>9} {'ms':>10} {'share':>6}  bound by"


def render(budget: Budget) -> str:
    """The whole report, ending with a line break."""
    lines = _head(budget)
    for phase in budget.phases:
        lines += _phase(budget, phase)
    return "\n".join([*lines, *_whole(budget)]) + "\n"


def _head(budget: Budget) -> list[str]:
    run, layout = budget.run, budget.run.layout
    stage = max(run.stages, key=lambda s: s.peak)
    resident = f"weights {_gib(stage.weights)}, gradients {_gib(stage.gradients)}, optimizer {_gib(stage.optimizer)}"
    if stage.reference:
        resident += f", reference {_gib(stage.reference)}"
    measured = sum(source.startswith("measured") for source in budget.hardware.sources.values())
    return [
        f"{run.num_parameters:,} parameters on {run.world_size} x {budget.hardware.name}: tensor {layout.tp} x "
        f"pipeline {layout.pp} x data {layout.dp}",
        f"{run.peak / 2**30:.1f} of {budget.hardware.device.memory_gib:g} GiB of a device; efficiencies: {measured} "
        f"measured, {len(budget.hardware.sources) - measured} assumed",
        f"  GiB: {resident}; in training activations and logits {_gib(stage.activations + stage.logits)}, in rollouts "
        f"their cache {_gib(stage.kv_cache)}",
        f"prefixes: {budget.lengths.mean:,.0f} tokens on average ({budget.lengths.origin})",
        "operations, bytes and time of a step are of the rank that takes longest",
        "",
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _phase(budget: Budget, phase: PhaseBudget) -> list[str]:
    counts = ", ".join(f"{count} {stream}" for stream, count in phase.figures.counts.items())
    lines = [f"Phase {phase.figures.name!r}: {phase.steps:,} steps of {counts}", _HEADS]
    lines += [_row(part, phase.step_s) for part in phase.parts]
    lines += _waits(phase)
    lines.append(f"  {'a step':22} {'':>10} {'':>9} {phase.step_s * 1e3:10,.1f} {'100%':>6}")
    lines += [f"  bounded by {phase.bound}", *_judge(budget, phase)]
    rate = budget.tokens_per_step(phase) / phase.step_s
    return [*lines, f"  {rate:,.0f} tokens/s through forward and backward, MFU {budget.mfu(phase):.1%}", ""]


def _row(part: Part, step_s: float) -> str:
    work = part.work
    return (
        f"  {part.name:22} {work.flops / 1e12:10,.3f} {work.memory_bytes / 1e9:9,.2f} {part.seconds * 1e3:10,.1f} "
        f"{part.seconds / step_s:6.1%}  {part.bound}"
    )


def _waits(phase: PhaseBudget) -> Iterable[str]:
    if phase.judge is None:
        return
    names = ("wait, lookahead 0", f"wait, lookahead {max(1, phase.lookahead)}")
    for index, (name, seconds) in enumerate(zip(names, phase.judge.exposed_s, strict=True)):
        counts = bool(phase.lookahead) == bool(index)
        share = f"{seconds / phase.step_s:6.1%}" if counts else f"{'':6}"
        note = "judge" if counts else "(not configured)"
        yield f"  {name:22} {'':>10} {'':>9} {seconds * 1e3:10,.1f} {share}  {note}"


def _judge(budget: Budget, phase: PhaseBudget) -> list[str]:
    judge = phase.judge
    if judge is None:
        return []
    if judge.load is None or budget.pool is None:
        return [f"  judge: embedded, {judge.calls:,} verdicts of a step in {judge.time.total_s * 1e3:,.1f} ms"]
    load, step_s = judge.load, phase.step_s
    lines = [
        f"  judge: {budget.pool.num_gpus} GPUs of {budget.pool.server.name}: {judge.calls:,} verdicts of a step in "
        f"{judge.time.total_s:,.1f} s",
        f"    {load.requests / step_s:,.0f} requests/s, {load.prompt_tokens / step_s:,.0f} prompt tokens/s and "
        f"{load.answer_tokens / step_s:,.0f} answer tokens/s at this step's pace",
    ]
    keep_up, depth = judge.keeping_up
    rate = load.requests / phase.compute_s
    pace = f"{rate:,.0f} requests/s, a step in {phase.compute_s:,.2f} s"
    lines.append(f"    to hide it: {keep_up:,} GPUs with lookahead {depth} ({pace})")
    for ahead, gpus in zip((0, max(1, phase.lookahead)), judge.gpus_hidden, strict=True):
        lines.append(f"    with lookahead {ahead}: {'no number of GPUs' if gpus is None else f'{gpus:,} GPUs'}")
    return lines


def _whole(budget: Budget) -> list[str]:
    hours = budget.total_s / 3600
    devices, steps = budget.run.world_size, sum(phase.steps for phase in budget.phases)
    lines = [
        f"The whole run: {steps:,} steps, {hours:,.1f} hours ({hours / 24:.1f} days), "
        f"{devices * hours:,.0f} device hours, {budget.tokens / 1e9:,.2f} billion tokens",
        "  without checkpoints and held-out measurements",
    ]
    if budget.pool is not None:
        lines.append(f"  and {budget.pool.num_gpus * hours:,.0f} GPU hours of the judge")
    return lines


def render_bounds(budgets: Mapping[str, Budget]) -> str:
    """One line per run: a step, with and without the judge, days, and what bounds it."""
    heads = f"{'run':46} {'step s':>8} {'compute s':>9} {'days':>6} {'judge GPUs to hide it':>22}  bounded by"
    lines = [heads]
    for name, budget in budgets.items():
        phase = budget.phases[-1]
        hidden = "-"
        if phase.judge is not None and phase.judge.keeping_up[0]:
            hidden = f"{phase.judge.keeping_up[0]:,} (lookahead {phase.judge.keeping_up[1]})"
        days = budget.total_s / 86400
        figures = f"{phase.step_s:8.2f} {phase.compute_s:9.2f} {days:6.2f} {hidden:>22}"
        lines.append(f"{name:46} {figures}  {phase.bound}")
    return "\n".join(lines) + "\n"
