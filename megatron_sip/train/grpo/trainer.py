"""The loop that trains the teacher: step, measure, log, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sip.checkpoint import CheckpointManager, StopDecision
from megatron_sip.data.loader import SampleLoader
from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.engine import Engine
from megatron_sip.observability.config import ObservabilityConfig
from megatron_sip.observability.console import Console
from megatron_sip.observability.metrics import MetricsLog
from megatron_sip.observability.samples import SampleLog
from megatron_sip.observability.timers import Timers
from megatron_sip.train.grpo.step import Answered, GRPOStep, StepReport, measures
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.train.trainer import RunEnd
from megatron_sip.types import CandidateGroup, IntArray, Judgment, Preference, Sample

STREAM = "prompts"
IDLE_STEPS = 10
"""Steps in a row without an update after which the run says why nothing is learned."""
VALIDATION_STEP = 1 << 40
"""Added to the step in a measurement's random numbers, so that they are none of training's."""


@dataclass(frozen=True)
class Rhythm:
    """Sizes and intervals of the loop, in steps; an interval of 0 means never."""

    train_iters: int
    global_batch_size: int
    eval_interval: int
    eval_samples: int
    eval_generations: int


class GRPOTrainer:
    """Runs the loop with the parts that ``build`` made."""

    def __init__(
        self,
        *,
        rhythm: Rhythm,
        context: ParallelContext,
        engine: Engine,
        step: GRPOStep,
        parts: Sequence[str],
        loader: SampleLoader,
        validation: SampleLoader | None,
        teacher: TeacherLink,
        checkpoints: CheckpointManager,
        record: GRPORecord,
        timers: Timers,
        decide_stop: Callable[[], StopDecision | None],
    ) -> None:
        """``validation``: None measures nothing. ``decide_stop``: asked after each step, the same on all ranks."""
        self._rhythm = rhythm
        self._context = context
        self._engine = engine
        self._runner = step
        self._parts = parts
        self._loader = loader
        self._validation = validation
        self._teacher = teacher
        self._checkpoints = checkpoints
        self._record = record
        self._timers = timers
        self._decide_stop = decide_stop
        self._step = 0
        self._tokens = 0
        self._idle_steps = 0
        self._is_silent = False

    def run(self) -> RunEnd:
        """Trains until ``train_iters``, a signal or the time limit; saves at the end. Collective."""
        self._record.open(self._step)
        stop: StopDecision | None = None
        if self._step == 0 and self._rhythm.eval_interval:
            measured = self.validate()
            self._record.validation(0, measured)
            self._warn_of_silence({name.removeprefix("validation/"): value for name, value in measured.items()})
        while self._step < self._rhythm.train_iters and stop is None:
            self._one_step()
            stop = self._decide_stop()
            self._checkpoints.poll()
            if self._checkpoints.due(self._step):
                self._save()
        if self._checkpoints.due(self._step, last=True):
            self._save()
        self._checkpoints.finish()
        end = RunEnd(self._step, True, "all steps are done", 0)
        if self._step < self._rhythm.train_iters:
            assert stop is not None
            end = RunEnd(self._step, False, stop.reason, stop.exit_code)
        self._record.message(f"the run ends at iteration {end.step}: {end.reason}")
        return end

    def _one_step(self) -> None:
        started = time.perf_counter()
        learning_rate = self._engine.learning_rate
        examples = self._loader.take(
            STREAM, self._rhythm.global_batch_size, self._context.dp_rank, self._context.dp_size
        )
        report = self._runner.train(examples, self._step)
        self._step += 1
        self._tokens += report.num_tokens
        elapsed_s = time.perf_counter() - started
        scalars = {
            **report.scalars,
            **self._timers.pop(),
            "learning-rate": learning_rate,
            "batch-size": float(self._rhythm.global_batch_size),
            "iteration-time": elapsed_s,
            "skipped": float(sum(result.skipped for result in report.results)),
            "tokens": float(self._tokens),
            "tokens_per_s": report.num_tokens / elapsed_s,
        }
        if report.results:
            scalars["grad-norm"] = float(np.mean([result.grad_norm for result in report.results]))
        if self._due():
            measured = self.validate()
            self._record.validation(self._step, measured)
            scalars |= measured
        self._record.step(self._step, report, scalars, self._loader.consumed_samples, elapsed_s)
        self._warn_of_idling(report)
        self._warn_of_silence(report.scalars)

    def _warn_of_idling(self, report: StepReport) -> None:
        self._idle_steps = 0 if report.results else self._idle_steps + 1
        if self._idle_steps == IDLE_STEPS:
            self._record.message(idle_message(report.scalars))

    def _warn_of_silence(self, scalars: Mapping[str, float]) -> None:
        """Says when the judges fall silent, not at each step while they are."""
        message = silence_message(scalars)
        if message and not self._is_silent:
            self._record.message(message)
        if any(name.startswith(_NO_REWARD) for name in scalars):  # a batch may hold safe suffixes alone
            self._is_silent = bool(message)

    def validate(self) -> dict[str, float]:
        """``validation/...``: rewards and measures on the same held-out examples each time. Collective."""
        if self._validation is None:
            return {}
        context, rhythm = self._context, self._rhythm
        examples = self._validation.peek(STREAM, rhythm.eval_samples, context.dp_rank, context.dp_size)
        answered = self._runner.answer(examples, VALIDATION_STEP + self._step, rhythm.eval_generations, learn=False)
        self._timers.pop()  # not a part of the step
        return {f"validation/{name}": value for name, value in measures(answered.scored, self._parts, context).items()}

    def _due(self) -> bool:
        interval = self._rhythm.eval_interval
        return interval > 0 and (self._step % interval == 0 or self._step == self._rhythm.train_iters)

    def _save(self) -> None:
        self._record.message(f"saving checkpoint at iteration {self._step}")
        self._checkpoints.save(self._step, self._build_state, self.state_dict())

    def _build_state(self, *, is_loading: bool, with_optimizer: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return self._engine.sharded_state_dict(is_loading, optimizer=with_optimizer, metadata=metadata)

    def load(self) -> int:
        """Goes on from the checkpoint that the options name, if there is one; returns the step. Collective."""
        loaded = self._checkpoints.load(self._build_state)
        if loaded is None:
            return 0
        self._engine.load_state_dict(loaded.state)
        if loaded.weights_only or not loaded.common:
            self._record.message(f"took the weights of {loaded.directory}")
        else:
            self.load_state_dict(loaded.common)
            self._record.message(f"resumed from {loaded.directory} at iteration {self._step}")
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run but weights and optimizer; equal on all ranks, nothing of the layout."""
        return {
            "step": self._step,
            "tokens": self._tokens,
            "data": self._loader.state_dict(),
            "engine": self._engine.common_state(),
            "teacher": self._teacher.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this run."""
        self._step = int(state["step"])
        self._tokens = int(state["tokens"])
        self._loader.load_state_dict(state["data"])
        self._engine.load_common_state(state["engine"])
        self._teacher.load_state_dict(state["teacher"])


_SEE_TO_JUDGES = (
    "The judges gave no verdict: see to --judge-max-tokens, --judge-prompt-length and --judge-prompts, which are to be "
    "those of their training, and to their servers."
)


_NO_REWARD = "no_reward/"
_SILENT = 0.5


def silence_message(scalars: Mapping[str, float]) -> str:
    """That most answers of a part have no reward, so that little is learned there; "" if they have."""
    for name, share in scalars.items():
        if name.startswith(_NO_REWARD) and share >= _SILENT:
            part = name.removeprefix(_NO_REWARD)
            return f"WARNING: {100 * share:.0f} % of the answers to {part} examples have no reward. {_SEE_TO_JUDGES}"
    return ""


def idle_message(scalars: Mapping[str, float]) -> str:
    """Why no group has anything to teach, and what helps; ``scalars`` are the last step's."""
    reward = scalars.get("reward/mean")
    start = f"no group had anything to teach in {IDLE_STEPS} steps: "
    if reward is None:
        return start + "no answer has a reward. " + _SEE_TO_JUDGES
    silent = max((value for name, value in scalars.items() if name.startswith("no_verdict/")), default=0.0)
    if silent > 0.9:  # a judge that hardly ever comes to a verdict
        return start + (
            f"{100 * silent:.0f} % of the answers have no verdict; start from a model that answers in the form of the "
            "prompts (--pretrained-checkpoint), or raise --rollout-max-new-tokens"
        )
    if scalars.get("grpo/skipped_missing"):
        start += f"{scalars['grpo/skipped_missing']:.0f} groups lack rewards. {_SEE_TO_JUDGES} Elsewhere "
    return start + (
        f"all answers to a prompt have the same reward, {reward:.3g} on average; near 1 the training is done, else "
        "raise --rollout-temperature, --rollout-top-p or --generations"
    )


class GRPORecord:
    """Console, metrics and sampled answers of a run. Ranks that log nothing are built with ``enabled`` False."""

    def __init__(
        self, config: ObservabilityConfig, decode: Callable[[IntArray], str], train_iters: int, enabled: bool
    ) -> None:
        self._config = config
        self._decode = decode
        self._console = Console(train_iters, config.log_interval) if enabled else None
        self._run_dir = config.run_dir if enabled else None
        self._tensorboard_dir = config.tensorboard_dir if enabled else None
        self._metrics: MetricsLog | None = None
        self._samples: SampleLog | None = None

    def open(self, first_step: int) -> None:
        """Opens the logs of a run that goes on after ``first_step``; what an earlier run wrote beyond it is dropped."""
        # Step 0 is the measurement before the first update.
        last = first_step if first_step else -1
        self._metrics = MetricsLog(self._run_dir, self._tensorboard_dir, last)
        self._samples = SampleLog(self._run_dir, self._decode, first_step)

    def step(
        self, step: int, report: StepReport, scalars: Mapping[str, float], consumed: int, elapsed_s: float
    ) -> None:
        """Records a finished step, numbered from 1."""
        assert self._metrics is not None and self._samples is not None, "open() before"
        self._metrics.log(step, scalars, consumed)
        if step % self._config.log_samples_interval == 0:
            self._samples.log(step, sampled(report.answered, self._config.log_samples))
        if self._console is not None:
            skipped = any(result.skipped for result in report.results)
            self._console.update(step, scalars, consumed, elapsed_s, skipped)

    def validation(self, step: int, scalars: Mapping[str, float]) -> None:
        """Prints a measurement; that of step 0 is logged here, later ones with their step."""
        if not scalars:
            return
        if step == 0:
            assert self._metrics is not None, "open() before"
            self._metrics.log(0, scalars, 0)
        fields = " | ".join(f"{name.removeprefix('validation/')}: {value:.3f}" for name, value in scalars.items())
        self.message(f"validation at iteration {step} | {fields} |")

    def message(self, text: str) -> None:
        """Prints a line on the one rank that has a console."""
        if self._console is not None:
            self._console.message(text)

    def close(self) -> None:
        """Flushes and closes the logs."""
        for log in (self._metrics, self._samples):
            if log is not None:
                log.close()


def sampled(answered: Answered, count: int) -> list[Preference]:
    """The first prompts with all answers and rewards, in the form of the sample log; the best answer is marked."""
    rows = []
    for index in range(min(count, len(answered.examples))):
        rewards = answered.scored[index].rewards
        sample = Sample(answered.examples[index].sample_id, 0, answered.prompts[index], np.zeros(0, dtype=np.int64))
        best = int(np.nanargmax(rewards)) if np.isfinite(rewards).any() else None
        group = CandidateGroup(sample, tuple(answered.rollouts[index]))
        judgment = Judgment(rewards, {answered.scored[index].part: rewards})
        rows.append(Preference(group, judgment, best, None, 1.0))
    return rows
