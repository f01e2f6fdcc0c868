"""The training loop: prepare, train, measure, log, save. Nothing else happens here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_sip.checkpoint import CheckpointManager, LoadedCheckpoint, StopDecision
from megatron_sip.curriculum import Curriculum, StepPlan, TriggerState
from megatron_sip.data.loader import SampleLoader
from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.engine import Engine
from megatron_sip.errors import RolloutError
from megatron_sip.observability.timers import Timers
from megatron_sip.train.lookahead import Lookahead
from megatron_sip.train.record import RunRecord
from megatron_sip.train.scalars import queue_scalars
from megatron_sip.train.step import StepOutcome, StepRunner
from megatron_sip.train.teacher_link import RunStopped, TeacherLink
from megatron_sip.train.validation import Validation


@dataclass(frozen=True)
class Schedule:
    """When the loop does what, in steps; an interval of 0 means never."""

    train_iters: int
    eval_interval: int = 0
    probe_interval: int = 0


@dataclass(frozen=True)
class RunEnd:
    """Why and where the loop ended."""

    step: int
    finished: bool
    """False: it was stopped by a signal or by its time limit, after saving; or its last save failed."""
    reason: str
    exit_code: int


class Trainer:
    """Runs the loop with the parts that ``train.build`` made."""

    def __init__(
        self,
        *,
        schedule: Schedule,
        context: ParallelContext,
        engine: Engine,
        loader: SampleLoader,
        curriculum: Curriculum,
        queue: Lookahead,
        runner: StepRunner,
        teacher: TeacherLink,
        validation: Validation | None,
        checkpoints: CheckpointManager,
        record: RunRecord,
        timers: Timers,
        decide_stop: Callable[[], StopDecision | None],
        describe_throughput: Callable[[int, float], Mapping[str, float]],
    ) -> None:
        """``decide_stop``: asked after each step, answers the same on all ranks. ``describe_throughput``: (tokens,
        seconds) of a step -> scalars."""
        self._schedule = schedule
        self._context = context
        self._engine = engine
        self._loader = loader
        self._curriculum = curriculum
        self._queue = queue
        self._runner = runner
        self._teacher = teacher
        self._validation = validation
        self._checkpoints = checkpoints
        self._record = record
        self._timers = timers
        self._decide_stop = decide_stop
        self._describe_throughput = describe_throughput
        self._step = 0
        self._trigger = TriggerState()
        self._tokens = 0

    def run(self) -> RunEnd:
        """Trains until ``train_iters``, a signal or the time limit; saves at the end. Collective."""
        self._record.open(self._step)
        stop: StopDecision | None = None
        while self._step < self._schedule.train_iters and stop is None:
            try:
                self._one_step()
            except RunStopped as stopped:
                # It waited for the teacher: the state is that of the step before, with what was prepared since.
                stop = stopped.decision
                break
            stop = self._decide_stop()
            self._checkpoints.poll()
            if self._checkpoints.due(self._step):
                self._save()
        if self._checkpoints.due(self._step, last=True):
            self._save()
        self._checkpoints.finish()
        end = RunEnd(self._step, True, "all steps are done", 0)
        if self._step < self._schedule.train_iters:
            assert stop is not None
            end = RunEnd(self._step, False, stop.reason, stop.exit_code)
        if self._checkpoints.due(self._step, last=True):
            # Training may go on after a failed save (--on-save-failure continue); a run may not end well with one.
            end = RunEnd(self._step, False, f"{end.reason}, but its last checkpoint could not be saved", 1)
        self._record.message(f"the run ends at iteration {end.step}: {end.reason}")
        return end

    def _one_step(self) -> None:
        started = time.perf_counter()
        with self._saved_if_rollouts_end():
            self._queue.extend(self._step, self._trigger, self._save_before_pause)
        prepared = self._queue.head(self._step)
        queued = queue_scalars(self._context, self._teacher, len(self._queue) - 1)
        with self._queue.unfinished():
            outcome = self._runner.train(prepared, self._save_before_pause)
            self._queue.done()
        self._tokens += outcome.num_tokens
        with self._saved_if_rollouts_end(step_is_done=True):
            self._runner.sync_rollouts()
        elapsed_s = time.perf_counter() - started
        scalars = {**queued, **self._scalars(prepared.plan, outcome, elapsed_s)}
        with self._saved_if_rollouts_end(step_is_done=True):
            scalars.update(self._measure_timed())
        self._step += 1
        self._record.step(self._step, prepared.plan.phase, outcome, scalars, self._consumed, elapsed_s)

    @property
    def _consumed(self) -> int:
        """Samples trained on: what is prepared ahead does not count yet."""
        return self._loader.consumed_samples - self._queue.num_samples

    def _scalars(self, plan: StepPlan, outcome: StepOutcome, elapsed_s: float) -> dict[str, float]:
        timings = self._timers.pop()
        return {
            **outcome.scalars,
            **outcome.health.scalars(),
            **timings,
            # What no timer covers: drawing and packing samples, metrics, norms. The parts add up to the whole.
            "timing/other_s": elapsed_s - sum(timings.values()),
            **self._describe_throughput(outcome.num_tokens, elapsed_s),
            "learning-rate": outcome.result.learning_rate,
            "batch-size": float(sum(plan.counts.values())),
            "grad-norm": outcome.result.grad_norm,
            "iteration-time": elapsed_s,
            "skipped": float(outcome.result.skipped),
            "tokens": float(self._tokens),
            "curriculum/phase": float(plan.phase_index),
        }

    def _measure_timed(self) -> dict[str, float]:
        """``_measure`` with its wall time, which is not part of ``iteration-time``."""
        started = time.perf_counter()
        scalars = self._measure()
        self._timers.pop()  # a probe's rollouts and verdicts are not the next step's
        if scalars:
            scalars["timing/evaluation_s"] = time.perf_counter() - started
        return scalars

    def _measure(self) -> dict[str, float]:
        """Held-out measurements after this step, if they are due."""
        # Planned anew: a probe since the step was prepared may have opened what this one would ask for.
        plan = self._curriculum.plan(self._step, self._trigger)
        scalars: dict[str, float] = {}
        done, last = self._step + 1, self._step + 1 == self._schedule.train_iters
        if self._validation is None:
            return scalars
        if _due(self._schedule.eval_interval, done, last):
            scalars["lm loss validation"] = self._validation.loss()
            self._record.validation(done, scalars["lm loss validation"])
        if plan.probe or _due(self._schedule.probe_interval, done, last):
            probed, _ = self._validation.probe(self._step)
            scalars.update(probed)
            if plan.probe:
                win_rate = probed.get("probe/chosen_rate/rollout", float("nan"))
                unplanned = self._queue.next_step(done)
                self._trigger = self._curriculum.observe(self._step, win_rate, self._trigger, unplanned)
        return scalars

    def _save(self) -> None:
        self._record.message(f"saving checkpoint at iteration {self._step}")
        self._checkpoints.save(self._step, self._build_state, self.state_dict())

    def _save_before_pause(self) -> None:
        """Between two steps, or before one has changed anything; it is on disk when this returns."""
        if self._checkpoints.due(self._step, last=True):
            self._save()
        self._checkpoints.finish()

    @contextmanager
    def _saved_if_rollouts_end(self, step_is_done: bool = False) -> Iterator[None]:
        """A run whose rollout servers do not come back ends (all ranks raise it together), but with what it has."""
        try:
            yield
        except RolloutError:
            self._step += step_is_done
            self._save_before_pause()
            raise

    def _build_state(self, *, is_loading: bool, with_optimizer: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's state in the form in which the checkpoint manager asks for it."""
        return self._engine.sharded_state_dict(is_loading, optimizer=with_optimizer, metadata=metadata)

    def load(self) -> int:
        """Goes on from the checkpoint that the options name, if there is one; returns the step. Collective."""
        loaded = self._checkpoints.load(self._build_state)
        if loaded is not None:
            self._engine.load_state_dict(loaded.state)
            self._resume(loaded)
        self._runner.sync_rollouts()
        self._timers.pop()  # that was no step's time
        return self._step

    def _resume(self, loaded: LoadedCheckpoint) -> None:
        # Megatron-LM's checkpoints hold weights and optimizer, but nothing of our data order and curriculum.
        if loaded.weights_only:
            self._record.message(f"took the weights of {loaded.directory}")
        elif loaded.common:
            self.load_state_dict(loaded.common)
            self._record.message(f"resumed from {loaded.directory} at iteration {self._step}")
        else:
            self._step = loaded.step
            self._record.message(f"resumed weights and optimizer of {loaded.directory} at iteration {self._step}")

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run but weights and optimizer; equal on all ranks, nothing of the layout."""
        # The answers on which a judge's running statistics rest are then in the queue's state, and all that a ledger
        # holds of answers there lies before the position that the teacher's state names.
        self._teacher.settle()
        queue = self._queue.state_dict()
        return {
            "step": self._step,
            "tokens": self._tokens,
            "trigger": self._trigger.state_dict(),
            **queue,
            "engine": self._engine.common_state(),
            "teacher": self._teacher.state_dict(),
            "verdicts": self._runner.verdicts.state_dict(),
            "alarms": self._record.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this run."""
        self._step = int(state["step"])
        self._tokens = int(state["tokens"])
        self._trigger = TriggerState.from_state_dict(state["trigger"])
        self._engine.load_common_state(state["engine"])
        self._teacher.load_state_dict(state["teacher"], self._queue.asked_again(state))
        # Checkpoints of earlier versions have none.
        self._runner.verdicts.load_state_dict(state.get("verdicts", {}))
        self._queue.load_state_dict(state)
        self._record.load_state_dict(state["alarms"])


def _due(interval: int, step: int, last: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last)
