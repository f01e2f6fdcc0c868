"""The budget of a whole run: every phase's parts, the judge beside them, and what the run comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.schedule_search import MAX_ROUNDS
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.dry_run import DryRun, PhaseFigures, examine
from megatron_sip.train.plan.costs import Work
from megatron_sip.train.plan.hardware import Hardware, JudgeServer
from megatron_sip.train.plan.judging import (
    JudgeLoad,
    JudgeTime,
    exposed_wait,
    gpus_to_hide,
    gpus_to_keep_up,
    judge_load,
    lookahead_to_hide,
    pool_time,
)
from megatron_sip.train.plan.lengths import PrefixLengths, prefix_lengths
from megatron_sip.train.plan.parts import DECODE, PREFILL, Part, PartList
from megatron_sip.train.plan.speed import Machine

JUDGE, REWRITES = "judge's servers", "wait for rewrites"


@dataclass(frozen=True)
class JudgePool:
    """The judge's servers, and how many GPUs they have together."""

    server: JudgeServer
    num_gpus: int


@dataclass(frozen=True)
class JudgeBudget:
    """The judge beside a phase's steps."""

    calls: int
    """Verdicts of a step."""
    time: JudgeTime
    exposed_s: tuple[float, float]
    """Seconds that a step waits: without lookahead, and with the run's (at least 1)."""
    load: JudgeLoad | None = None
    """A step's rewrites included; None for an embedded judge."""
    gpus_hidden: tuple[int | None, int | None] = (None, None)
    """Fewest GPUs whose verdicts nobody waits for, without and with lookahead; None: no number is enough."""
    keeping_up: tuple[int, int] = (0, 0)
    """Fewest GPUs that answer a step's questions in a step's time, and the lookahead that hides those."""


@dataclass(frozen=True)
class PhaseBudget:
    """A step of one phase of the curriculum."""

    figures: PhaseFigures
    steps: int
    parts: tuple[Part, ...]
    judge: JudgeBudget | None
    lookahead: int

    @property
    def compute_s(self) -> float:
        """All parts but the wait for verdicts."""
        return sum(part.seconds for part in self.parts)

    @property
    def exposed_s(self) -> float:
        """The wait, as the run is configured."""
        return 0.0 if self.judge is None else self.judge.exposed_s[1 if self.lookahead else 0]

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def model_flops(self) -> float:
        return sum(part.model_flops for part in self.parts)

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        part = max(self.parts, key=lambda p: p.seconds)
        if self.exposed_s > part.seconds:
            rest = f"; then {part.name}, by {part.bound} ({part.seconds / self.compute_s:.0%} of the rest)"
            return f"waiting for the judge ({self.exposed_s / self.step_s:.0%} of a step){rest}"
        return f"{part.name}, by {part.bound} ({part.seconds / self.step_s:.0%} of a step)"


@dataclass(frozen=True)
class Budget:
    """What ``tools/plan.py`` prints."""

    run: DryRun
    hardware: Hardware
    lengths: PrefixLengths
    phases: tuple[PhaseBudget, ...]
    pool: JudgePool | None
    longest_prefix: int
    """Tokens, as the dry run's counts take every prefix to be."""

    @property
    def total_s(self) -> float:
        """Of all steps; checkpoints and held-out measurements are not in it."""
        return sum(phase.steps * phase.step_s for phase in self.phases)

    @property
    def tokens(self) -> float:
        """Through forward and backward in the whole run, prefixes at their mean length."""
        return sum(phase.steps * self.tokens_per_step(phase) for phase in self.phases)

    def tokens_per_step(self, phase: PhaseBudget) -> float:
        """Like the dry run's, but with prefixes of their mean length."""
        figures, longest = phase.figures, self.longest_prefix
        sip = sum(count for stream, count in figures.counts.items() if stream != "ntp")
        return figures.tokens - sip * (longest - self.lengths.mean)

    def mfu(self, phase: PhaseBudget) -> float:
        """Operations of forward and backward over what all devices could do in a step's time."""
        peak = self.hardware.device.peak_tflops * 1e12 * self.run.world_size
        return phase.model_flops / (phase.step_s * peak)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "hardware": self.hardware.name,
            "ranks": self.run.world_size,
            "parameters": self.run.num_parameters,
            "mean_prefix_tokens": self.lengths.mean,
            "total_s": self.total_s,
            "tokens": self.tokens,
            "phases": [self._phase_dict(phase) for phase in self.phases],
        }

    def _phase_dict(self, phase: PhaseBudget) -> dict[str, Any]:
        parts = {
            part.name: {"seconds": part.seconds, "bound": part.bound, "causes": dict(part.causes),
                        **dataclasses.asdict(part.work)}
            for part in phase.parts
        }  # fmt: skip
        return {
            "name": phase.figures.name,
            "steps": phase.steps,
            "step_s": phase.step_s,
            "exposed_wait_s": phase.exposed_s,
            "mfu": self.mfu(phase),
            "tokens_per_s": self.tokens_per_step(phase) / phase.step_s,
            "bound": phase.bound,
            "parts": parts,
            "judge": None if phase.judge is None else dataclasses.asdict(phase.judge),
        }


def plan(
    config: TrainConfig, hardware: Hardware, world_size: int, pool: JudgePool | None, prefix_tokens: int | None
) -> Budget:
    """The budget of ``config`` on ``world_size`` devices of ``hardware``.

    Raises:
        ConfigurationError: it cannot work, does not fit the devices' memory, or the judge pool is too small.
    """
    on_device = dataclasses.replace(config.training, dry_run_device_gib=hardware.device.memory_gib)
    config = dataclasses.replace(config, training=on_device)
    run = examine(config, world_size)
    if not run.fits:
        raise ConfigurationError(
            f"the model needs {run.peak / 2**30:.1f} GiB on a rank, {hardware.name or 'the device'} has "
            f"{hardware.device.memory_gib:g}: lower the micro-batch sizes or --rollout-batch-size, give "
            "--recompute-granularity full, or raise tensor or pipeline parallel"
        )
    lengths = prefix_lengths(config, run.missing, prefix_tokens)
    machine = Machine(hardware, world_size)
    maker = PartList(config, run, lengths, machine)
    left, phases = run.train_iters, []
    for figures in run.phases:
        steps = left if figures.steps is None else min(left, figures.steps)
        left -= steps
        parts = tuple(maker.of(figures))
        rewrites = None
        if pool is not None and figures.rewrites:
            rewrites = _rewrite_load(config, figures, lengths, pool)
            parts = (*parts, _rewriter(config, rewrites, lengths, pool, parts))
        compute_s, hidden_s = sum(part.seconds for part in parts), maker.unjudged_seconds(parts)
        judge = _judge(config, figures, run, lengths, hardware, pool, rewrites, compute_s, hidden_s)
        phases.append(PhaseBudget(figures, steps, parts, judge, config.training.lookahead))
    return Budget(run, hardware, lengths, tuple(phases), pool, config.data.max_prefix_length)


def _rewrite_load(config: TrainConfig, figures: PhaseFigures, lengths: PrefixLengths, pool: JudgePool) -> JudgeLoad:
    suffix = config.data.suffix_length
    prompt = lengths.mean + suffix + pool.server.question.template_tokens
    return JudgeLoad(figures.rewrites, figures.rewrites, figures.rewrites * prompt, figures.rewrites * suffix)


def _rewriter(
    config: TrainConfig, load: JudgeLoad, lengths: PrefixLengths, pool: JudgePool, parts: Sequence[Part]
) -> Part:
    """The wait for rewrites from the judge's servers: asked for before the rollouts begin, ``rewrite_lookahead`` steps
    earlier, and needed after them (``train.lookahead``)."""
    suffix, question = config.data.suffix_length, pool.server.question
    prompt = lengths.mean + suffix + question.template_tokens
    server = dataclasses.replace(pool.server, question=dataclasses.replace(question, answer_tokens=suffix))
    time = pool_time(load, server, pool.num_gpus, 1, prompt)
    compute_s = sum(part.seconds for part in parts)
    rollouts_s = sum(part.seconds for part in parts if part.name in (PREFILL, DECODE))
    wait_s = exposed_wait(time, compute_s, rollouts_s, config.training.rewrite_lookahead)
    return Part(REWRITES, Work(), {JUDGE: wait_s})


def _judge(
    config: TrainConfig, figures: PhaseFigures, run: DryRun, lengths: PrefixLengths, hardware: Hardware,
    pool: JudgePool | None, rewrites: JudgeLoad | None, compute_s: float, hidden_s: float,
) -> JudgeBudget | None:  # fmt: skip
    if not figures.judge.groups:
        return None
    ahead = max(1, config.training.lookahead)
    load: JudgeLoad | None = None
    gpus: Sequence[int | None] = (None, None)
    if pool is None:
        groups = figures.judge.groups / run.layout.dp
        tokens = groups * config.rollout.pool.num_candidates * config.data.suffix_length
        efficiency = hardware.efficiency
        seconds = efficiency.embedded_judge_ms * 1e-3 + tokens * efficiency.embedded_judge_us * 1e-6
        time, keeping_up = JudgeTime(seconds, seconds), (0, 0)
    else:
        rounds = MAX_ROUNDS if config.teacher.pair_schedule == "best_worst" else 1
        suffix = config.data.suffix_length
        prompt = lengths.mean + 2 * suffix + pool.server.question.template_tokens
        load = judge_load(figures.judge, lengths.mean, suffix, pool.server)
        load = load if rewrites is None else load + rewrites  # the same servers do both
        time = pool_time(load, pool.server, pool.num_gpus, rounds, prompt)
        enough = gpus_to_keep_up(load, pool.server, prompt, compute_s)
        then = pool_time(load, pool.server, enough, rounds, prompt)
        keeping_up = (enough, lookahead_to_hide(then, compute_s, hidden_s))
        gpus = [gpus_to_hide(load, pool.server, rounds, prompt, compute_s, hidden_s, depth) for depth in (0, ahead)]
    exposed = (exposed_wait(time, compute_s, hidden_s, 0), exposed_wait(time, compute_s, hidden_s, ahead))
    return JudgeBudget(figures.judge.total, time, exposed, load, (gpus[0], gpus[1]), keeping_up)
