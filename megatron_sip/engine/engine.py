"""The training engine: what the step loop calls.

A step is ``begin_step``, any number of ``run``, ``optimizer_step``. All are collective over the job's ranks: every rank
makes the same calls in the same order, with micro-batches of the same shapes (its own replica's rows in them).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.config import EngineConfig
from megatron_sip.engine.gradients import GradientStep, wrap_chunks
from megatron_sip.engine.lr import LearningRate
from megatron_sip.engine.metrics import MetricSums, padding
from megatron_sip.engine.optimizer import STATE_FORMAT, Optimizer
from megatron_sip.engine.passes import Metrics, PassRunner
from megatron_sip.engine.reference import ReferencePolicy
from megatron_sip.errors import SIPError
from megatron_sip.objectives import ReferenceOptions
from megatron_sip.types import RowBatch, StepResult, TrainPass

POLICY, REFERENCE = "policy", "reference"


class Engine:
    """Owns the gradient buffers, the optimizer, the learning rate and the reference policy of the model's chunks."""

    def __init__(
        self,
        chunks: Sequence[Any],
        config: EngineConfig,
        objective_config: ReferenceOptions,
        context: ParallelContext,
        train_iters: int,
    ) -> None:
        """Takes over ``chunks`` (what ``model.build_model`` returned): they stay usable, their storage moves.

        Raises:
            ConfigurationError: the learning-rate schedule does not fit into ``train_iters``.
        """
        self._config = config
        self._context = context
        self._learning_rate = LearningRate.of(config, train_iters)
        self.chunks = list(chunks)
        self._wrapped = wrap_chunks(self.chunks, context, config.accumulate_allreduce_grads_in_fp32)
        self._gradients = GradientStep(self._wrapped)
        self._optimizer = Optimizer(config, context, self._wrapped)
        self._runner = PassRunner(self._wrapped, context)
        self._reference: ReferencePolicy | None = None
        if objective_config.needs_reference:
            self._reference = ReferencePolicy(objective_config, self.chunks, context.device)
        self._metrics = MetricSums(context)
        self.num_updates = 0
        """Optimizer steps that changed the weights: the version of the policy."""
        self.num_skipped = 0
        """Steps skipped because a gradient was NaN or Inf."""
        self._consecutive_skips = 0

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return self._learning_rate(self.num_updates)

    @property
    def has_reference(self) -> bool:
        """Whether ``score(..., "reference")`` works."""
        return self._reference is not None

    @property
    def reference_version(self) -> int:
        """Optimizer steps behind the reference policy's weights; -1 without a reference."""
        return -1 if self._reference is None else self._reference.version

    def begin_step(self) -> None:
        """Forgets gradients and metrics of the step before."""
        self._gradients.begin()
        self._optimizer.zero_grad()
        self._metrics.clear()

    def run(self, train_pass: TrainPass, last: bool) -> Metrics:
        """Forward and backward of one pass; ``last`` marks the step's last pass.

        Returns this replica's metric sums (empty but on the last stage); ``collect_metrics`` has the job's, with
        ``padding/<name of the pass>``, the share of the tokens computed that were padding or taught nothing.

        Raises:
            ValueError: no micro-batch, or micro-batches of several kinds.
        """
        with self._gradients.call(last):
            results = self._runner.train(train_pass.batches, train_pass.objective, train_pass.scale)
        if self._context.is_last_stage:
            device = self._context.device
            self._metrics.add([padding(train_pass.name, batch, device) for batch in train_pass.batches])
        return self._metrics.add(results)

    def collect_metrics(self) -> dict[str, tuple[float, float]]:
        """Metric name -> (sum, count) of all passes since ``begin_step``, over all replicas, on every rank."""
        return self._metrics.collect()

    def evaluate(self, train_pass: TrainPass) -> dict[str, tuple[float, float]]:
        """Forward only: metric name -> (sum, count) over all replicas, on every rank. ``scale`` is not used."""
        self._optimizer.finish_parameter_sync()
        metrics = MetricSums(self._context)
        metrics.add(self._runner.evaluate(train_pass.batches, train_pass.objective))
        return metrics.collect()

    def score(self, batches: Sequence[RowBatch], which: str = POLICY) -> list[torch.Tensor]:
        """float32 log-probs [B, L] of each batch under the policy or the reference, on every rank of the replica.

        Raises:
            ValueError: ``which`` is neither, or there is no reference.
        """
        self._optimizer.finish_parameter_sync()
        if which == POLICY:
            return self._runner.score(batches)
        if which != REFERENCE:
            raise ValueError(f"score under {POLICY!r} or {REFERENCE!r}, not {which!r}")
        if self._reference is None:
            raise ValueError("there is no reference policy to score under: the objective needs none")
        with self._reference.swapped_in():
            return self._runner.score(batches)

    def optimizer_step(self) -> StepResult:
        """Reduces the gradients once, updates the weights, and lets the reference follow.

        Raises:
            SIPError: more than ``max_skipped_steps`` steps in a row had a NaN or Inf gradient.
        """
        self._gradients.finish()
        grad_norm = self._optimizer.prepare()
        learning_rate = self.learning_rate
        # The norm is over the whole job, so all ranks decide alike. Without a loss scaler Megatron would not look.
        if not math.isfinite(grad_norm):
            self._skip(grad_norm)
            return StepResult(grad_norm, skipped=True, learning_rate=learning_rate)
        self._optimizer.step(grad_norm, learning_rate)
        self.num_updates += 1
        self._consecutive_skips = 0
        if self._reference is not None:
            self._optimizer.finish_parameter_sync()
            self._reference.update(self.num_updates)
        return StepResult(grad_norm, skipped=False, learning_rate=learning_rate)

    def _skip(self, grad_norm: float) -> None:
        self.num_skipped += 1
        self._consecutive_skips += 1
        if self._consecutive_skips > self._config.max_skipped_steps:
            raise SIPError(
                f"the gradient norm was {grad_norm} in {self._consecutive_skips} steps in a row, more than "
                f"--max-skipped-steps {self._config.max_skipped_steps}, after {self.num_updates} good steps: lower "
                f"--lr ({self.learning_rate:g} here) or --clip-grad, or go on from an earlier checkpoint."
            )

    def finish_parameter_sync(self) -> None:
        """Completes what an optimizer step left to the next forward pass, so that the chunks hold the new weights."""
        self._optimizer.finish_parameter_sync()

    def parameter_norm(self) -> float:
        """L2 norm of the whole model's parameters."""
        self._optimizer.finish_parameter_sync()
        return self._optimizer.parameter_norm()

    def reset_reference(self) -> None:
        """Makes the present weights the reference: for a run that starts from loaded ones."""
        if self._reference is not None:
            self._optimizer.finish_parameter_sync()
            self._reference.capture(self.num_updates)

    def sharded_state_dict(
        self,
        is_loading: bool = False,
        optimizer: bool = True,
        reference: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """State for ``megatron.core.dist_checkpointing``, loadable at any TP x PP x DP.

        "model" (with virtual stages "model0", "model1", ...) has Megatron-LM's keys. "optimizer" and "reference" are
        there if asked for, the latter only if the run has one. ``metadata`` is what a checkpoint says of its own
        format; left out it is ``STATE_FORMAT``.

        Raises:
            SIPError: the format's optimizer state is bound to its layout.
        """
        self._optimizer.finish_parameter_sync()
        metadata = {**STATE_FORMAT, **(metadata or {})}
        states = [chunk.sharded_state_dict(metadata=dict(metadata)) for chunk in self.chunks]
        model = dict(zip(self._model_keys(), states, strict=True))
        state: dict[str, Any] = dict(model)
        if optimizer:
            state["optimizer"] = self._optimizer.sharded_state_dict(model, is_loading, metadata)
        if reference and self._reference is not None:
            state["reference"] = self._reference.sharded_state_dict(states)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes ``sharded_state_dict(is_loading=True, ...)`` back, filled from a checkpoint.

        Without "optimizer" the optimizer starts anew from the loaded weights; without "reference" these become the
        reference.
        """
        for key, chunk in zip(self._model_keys(), self.chunks, strict=True):
            chunk.load_state_dict(state[key], strict=True)
        if "optimizer" in state:
            self._optimizer.load_state_dict(state["optimizer"])
        else:
            self._optimizer.reload_main_parameters()
        if self._reference is not None:
            if "reference" in state:
                self._reference.load_state_dict(state["reference"])
            else:
                self.reset_reference()

    def common_state(self) -> dict[str, int]:
        """The counters: small, equal on all ranks, for a checkpoint's common part."""
        return {
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "consecutive_skips": self._consecutive_skips,
            "reference_version": self.reference_version,
        }

    def load_common_state(self, state: Mapping[str, int]) -> None:
        """Takes ``common_state`` back, after ``load_state_dict``."""
        self.num_updates = state["num_updates"]
        self.num_skipped = state["num_skipped"]
        self._consecutive_skips = state["consecutive_skips"]
        if self._reference is not None and state["reference_version"] >= 0:
            self._reference.version = state["reference_version"]

    def _model_keys(self) -> Iterable[str]:
        if len(self.chunks) == 1:
            return ["model"]
        return [f"model{number}" for number in range(len(self.chunks))]
