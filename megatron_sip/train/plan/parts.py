"""The parts of a step on the rank that takes longest, as work and seconds. Built from a dry run's figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_sip.rollout.config import gathers_weights
from megatron_sip.train.checks import reference_policy
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.dry_run import DryRun, PhaseFigures
from megatron_sip.train.estimate import BYTES_FP32, Layout
from megatron_sip.train.plan import costs
from megatron_sip.train.plan.costs import Rows, Share, Work
from megatron_sip.train.plan.lengths import PrefixLengths, candidate_rows, rollout_batches
from megatron_sip.train.plan.speed import LAUNCHES, LINK, Machine

PREFILL, DECODE, REFERENCE, OPTIMIZER = "rollout: prefill", "rollout: decode", "reference", "optimizer"
GRADIENTS, PARAMETERS, OTHER = "gradient reduction", "parameter gather", "other"


@dataclass(frozen=True)
class Part:
    """One part of a step."""

    name: str
    work: Work
    """Of the rank that takes longest."""
    causes: Mapping[str, float]
    """Seconds by cause (``plan.speed``)."""
    model_flops: float = 0.0
    """Operations of forward and backward on the whole job, without what is computed again or is padding of batches."""

    @property
    def seconds(self) -> float:
        return sum(self.causes.values())

    @property
    def bound(self) -> str:
        """What takes most of its time."""
        return max(self.causes, key=lambda cause: self.causes[cause]) if self.seconds else "-"


class PartList:
    """Works out the parts of one configuration on one machine."""

    def __init__(self, config: TrainConfig, run: DryRun, lengths: PrefixLengths, machine: Machine) -> None:
        self._config = config
        self._run = run
        self._lengths = lengths
        self._machine = machine
        self._layout = run.layout
        self._weight_bytes = 2 if config.model.bf16 else BYTES_FP32
        self._tp_link = machine.link(1, run.layout.tp) if run.layout.tp > 1 else None
        self._pp_link = machine.link(run.layout.tp * run.layout.dp, run.layout.pp)

    def of(self, phase: PhaseFigures) -> list[Part]:
        """All parts but the judge's, in the order in which a step has them."""
        parts = list(self._rollouts(phase))
        for stream in ("ntp", "suffix", "rewrite"):
            if phase.counts.get(stream):
                parts.append(self._training(stream, phase))
        if phase.counts.get("rollout"):
            if reference_policy(self._config) != "none":
                parts.append(self._reference(phase))
            parts.append(self._training("rollout", phase))
        trained = [part for part in parts if part.name.startswith("train: ")][-1]
        stream = trained.name.removeprefix("train: ")
        return [*parts, *self._update(trained.seconds / phase.micro_batches[stream]), self._other()]

    def unjudged_seconds(self, parts: Iterable[Part]) -> float:
        """Of the parts that run between submission and verdicts of the same step."""
        names = {f"train: {stream}" for stream in ("ntp", "suffix", "rewrite")}
        if self._config.training.reference_scoring == "early":
            names.add(REFERENCE)
        return sum(part.seconds for part in parts if part.name in names)

    def _share(self, tp: int | None = None, last: bool = True) -> Share:
        layout, arch = self._layout, self._run.architecture
        return Share(
            architecture=arch,
            num_layers=arch.num_layers // layout.pp,
            vocab_size=self._run.vocab_size,
            weight_bytes=self._weight_bytes,
            tp=layout.tp if tp is None else tp,
            sequence_parallel=layout.sequence_parallel,
            has_output=last,
        )

    def _rollouts(self, phase: PhaseFigures) -> Iterator[Part]:
        slots = self._config.rollout.pool.num_rollouts
        if not phase.rollouts or self._config.rollout.rollout_engine != "in_process":
            return
        lengths = self._lengths.take(phase.counts["rollout"] // self._layout.dp)
        rows, tp = self._config.rollout.rollout_batch_size, self._layout.tp
        if self._gathers():
            lengths, rows, tp = sorted(lengths)[tp - 1 :: tp] or lengths[:1], rows // tp, 1
        in_flight = self._layout.pp if self._layout.virtual_stages == 1 else 1
        batches = list(rollout_batches(lengths, max(1, max(1, rows // in_flight) // slots)))
        share = self._share(tp=tp)
        # Stages take turns: with fewer batches than stages under way some stage is idle.
        idle = -(-len(batches) // in_flight) * self._layout.pp / len(batches)
        tokens = self._config.rollout.rollout_max_new_tokens or self._config.data.suffix_length
        link = self._tp_link if tp > 1 else None
        reading = _sum(costs.prefill(share, groups, width) for groups, width in batches) * idle
        writing = _sum(costs.decode(share, groups, slots, width, tokens) for groups, width in batches) * idle
        if self._gathers():
            size = self._run.stages[0].weights * (self._layout.tp - 1)
            reading += Work(sent_bytes=size, collectives=self._run.architecture.num_layers)
            link = self._tp_link
        yield Part(PREFILL, reading, self._machine.causes(reading, "prefill", link))
        yield Part(DECODE, writing, self._machine.causes(writing, "decode", link))

    def _gathers(self) -> bool:
        size = self._run.num_parameters * self._weight_bytes
        return gathers_weights(self._config.rollout.rollout_weights, size, self._layout.tp)

    def _micro_batches(self, stream: str, phase: PhaseFigures, candidates: int) -> list[Rows]:
        training, data = self._config.training, self._config.data
        count = phase.counts[stream] // self._layout.dp
        if stream == "ntp":
            rows = Rows(training.micro_batch_size, data.seq_length, data.seq_length)
            return [rows] * -(-count // training.micro_batch_size)
        lengths = self._lengths.take(count)
        return list(candidate_rows(lengths, training.judged_micro_batch_size, candidates, data.suffix_length))

    def _training(self, stream: str, phase: PhaseFigures) -> Part:
        candidates = {"ntp": 0, "rollout": self._config.preference.num_candidates}.get(stream, 1)
        # DPO's loss is not linear in the log-probs: the output layer is computed once more (docs/design/compute.md).
        again = stream == "rollout" and self._config.objective.objective in ("online_dpo", "grpo")
        recompute = self._config.model.recompute_granularity == "full"
        share = self._share()
        rows = self._micro_batches(stream, phase, candidates)
        work = self._piped([costs.train(share, micro, again, recompute) for micro in rows])
        whole = Share(self._run.architecture, self._run.architecture.num_layers, self._run.vocab_size, 1)
        model = sum(costs.train(whole, micro, recomputes_logits=False).flops for micro in rows) * self._layout.dp
        return Part(f"train: {stream}", work, self._model_parallel(work, "train", rows, 2), model)

    def _reference(self, phase: PhaseFigures) -> Part:
        trained, pool = self._config.preference.num_candidates, self._config.rollout.pool
        count = phase.counts["rollout"] // self._layout.dp
        size, block = self._config.training.judged_micro_batch_size, self._config.data.suffix_length
        lengths = self._lengths.take(count)
        if self._config.training.reference_scoring == "early":
            # train.references.score_candidates: rows of as many candidates as a micro-batch of training has in all.
            per_row = min(pool.num_candidates, size * trained)
            lengths = [length for length in lengths for _ in range(-(-pool.num_candidates // per_row))]
            size, trained = max(1, size * trained // per_row), per_row
        rows = list(candidate_rows(lengths, size, trained, block))
        work = self._piped([costs.forward(self._share(), micro) for micro in rows])
        return Part(REFERENCE, work, self._model_parallel(work, "forward", rows, 1))

    def _piped(self, micro_batches: Sequence[Work]) -> Work:
        """All micro-batches on the last stage, and its idle time as work: (p - 1) / v micro-batches more (Narayanan et
        al. 2021, section 2.2)."""
        work = _sum(micro_batches)
        layout = self._layout
        if layout.pp > 1:
            work *= 1 + (layout.pp - 1) / layout.virtual_stages / len(micro_batches)
        return work

    def _model_parallel(self, work: Work, kind: str, rows: Sequence[Rows], directions: int) -> Mapping[str, float]:
        causes = dict(self._machine.causes(work, kind, self._tp_link))
        if self._layout.pp > 1:
            size = sum(r.tokens for r in rows) * self._run.architecture.hidden_size * self._weight_bytes * directions
            sends = Work(sent_bytes=size * self._layout.virtual_stages, collectives=len(rows) * directions)
            extra = self._machine.causes(sends, kind, self._pp_link)
            causes = {cause: seconds + extra[cause] for cause, seconds in causes.items()}
        return causes

    def _update(self, last_micro_batch_s: float) -> Iterator[Part]:
        stage = max(self._run.stages, key=lambda s: s.parameters)
        layout, weight = self._layout, self._weight_bytes
        gradient = stage.gradients // stage.parameters
        layers = self._run.architecture.num_layers // layout.pp
        shards = layout.dp if layout.distributed_optimizer else 1
        step = costs.optimizer(stage.parameters, gradient, weight, layers, shards)
        yield Part(OPTIMIZER, step, self._machine.causes(step, "optimizer"))
        if layout.dp == 1:
            return
        link = self._machine.link(layout.tp, layout.dp)
        reduced, gathered = _exchanged(stage.gradients, stage.weights, layout)
        causes = dict(self._machine.causes(reduced, "optimizer", link))
        if self._config.parallel.overlap_grad_reduce:
            # Only the last micro-batch's backward pass, two thirds of its time, may overlap (engine.gradients).
            causes[LINK] = max(0.0, causes[LINK] - 2 / 3 * last_micro_batch_s)
        yield Part(GRADIENTS, reduced, causes)
        if layout.distributed_optimizer:
            yield Part(PARAMETERS, gathered, self._machine.causes(gathered, "optimizer", link))

    def _other(self) -> Part:
        """Zeroing the gradients, the parameters' norm, and what the machine's step_ms says."""
        stage = max(self._run.stages, key=lambda s: s.parameters)
        work = Work(moved_bytes=stage.gradients + stage.weights)
        causes = dict(self._machine.causes(work, "optimizer"))
        causes[LAUNCHES] += self._machine.hardware.efficiency.step_ms * 1e-3
        return Part(OTHER, work, causes)


def _exchanged(gradients: float, weights: float, layout: Layout) -> tuple[Work, Work]:
    """Reduce-scatter of the gradients and all-gather of the weights; or one all-reduce and nothing."""
    share = (layout.dp - 1) / layout.dp
    if not layout.distributed_optimizer:
        return Work(sent_bytes=costs.all_reduce_bytes(gradients, layout.dp), collectives=1), Work()
    return Work(sent_bytes=share * gradients, collectives=1), Work(sent_bytes=share * weights, collectives=1)


def _sum(works: Iterable[Work]) -> Work:
    total = Work()
    for work in works:
        total += work
    return total
