"""What a run measures on documents that it does not train on: the next-token loss, and how often rollouts win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sip.data.batches import next_token_batches
from megatron_sip.data.loader import SampleLoader
from megatron_sip.data.samples import Window
from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.engine import Engine
from megatron_sip.preference import PreferenceConfig, preference_metrics, preference_sums, select
from megatron_sip.train.prepare import Preparer, StepShape
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.types import Preference

PROBE_STEP = 1 << 40
"""Added to the step in a probe's random numbers and in a ledger, so that neither is training's."""


class Validation:
    """Measures on the same held-out samples each time."""

    def __init__(
        self,
        *,
        engine: Engine,
        preparer: Preparer,
        teacher: TeacherLink,
        loader: SampleLoader,
        context: ParallelContext,
        shape: StepShape,
        preference: PreferenceConfig,
        num_windows: int,
        num_probes: int,
    ) -> None:
        """``num_windows`` and ``num_probes``: windows and prefixes over all replicas."""
        self._engine = engine
        self._preparer = preparer
        self._teacher = teacher
        self._loader = loader
        self._context = context
        self._shape = shape
        self._preference = preference
        self._num_windows = num_windows
        self._num_probes = num_probes

    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token of the first windows of the validation stream."""
        windows: Sequence[Window] = self._peek("ntp", self._num_windows)
        totals = {"nll": 0.0, "tokens": 0.0}
        if windows:
            batches = next_token_batches(
                windows,
                self._shape.micro_batch_size,
                pad_multiple=self._shape.pad_multiple,
                masked_eod_id=self._shape.masked_eod_id,
            )
            for batch, log_probs in zip(batches, self._engine.score(batches, which="policy"), strict=True):
                totals["nll"] -= float((log_probs.double().cpu() * batch.mask).sum())
                totals["tokens"] += float(batch.mask.sum())
        sums = self._context.sum_over_data_parallel(totals)
        return sums["nll"] / sums["tokens"]

    def probe(self, step: int) -> tuple[dict[str, float], Sequence[Preference]]:
        """Judges the configured candidates of held-out prefixes and trains on none of them.

        Returns (scalars ``probe/...``, this replica's preferences).
        """
        samples = self._peek("sip", self._num_probes)
        groups = self._preparer.build_groups(PROBE_STEP + step, samples)
        # The step names the probe in a ledger too: samples, and questions among them, are the same each time.
        ticket = self._teacher.submit_groups(groups, learn=False, step=PROBE_STEP + step)
        judged = self._teacher.collect_groups(ticket)
        preferences = select(groups, judged.judgments, self._preference)
        sums = self._context.sum_over_data_parallel(preference_sums(preferences))
        scalars = {
            name.replace("sip/", "probe/", 1): value
            for name, value in preference_metrics(sums).items()
            if "_rate/" in name or name.startswith("sip/score/")
        }
        return scalars, preferences

    def _peek(self, stream: str, count: int) -> list[Any]:
        return self._loader.peek(stream, count, self._context.dp_rank, self._context.dp_size)
