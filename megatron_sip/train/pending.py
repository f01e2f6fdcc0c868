"""A prepared step in a checkpoint: its candidates, and its verdicts if they have come.

Samples are not stored: they follow from their positions in the streams. Groups of all replicas stand in their global
order, so that another number of replicas can share them anew.

Shape legend: G groups of all replicas (rewrite stream, then judged), M their candidates, T tokens of all of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megatron_sip.curriculum import StepPlan
from megatron_sip.data.build import NEXT_TOKEN, SUFFIX
from megatron_sip.data.loader import SampleLoader
from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import ConfigurationError
from megatron_sip.rollout.statistics import rollout_sums
from megatron_sip.teacher.interfaces import GroupVerdict
from megatron_sip.train.prepare import DrawnStep, PreparedStep, Preparer
from megatron_sip.train.teacher_link import JudgedGroups, TeacherLink
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Sample

_KINDS = tuple(CandidateKind)


class PendingState:
    """Between prepared steps and checkpoints. Its methods are collective over the job."""

    def __init__(
        self,
        preparer: Preparer,
        teacher: TeacherLink,
        loader: SampleLoader,
        context: ParallelContext,
        eod_id: int,
        row_sizes: Mapping[str, int],
    ) -> None:
        """``row_sizes``: stream -> rows of its micro-batches, which each replica's samples must fill."""
        self._preparer = preparer
        self._teacher = teacher
        self._loader = loader
        self._context = context
        self._eod_id = eod_id
        self._row_sizes = row_sizes

    def state_of(self, prepared: PreparedStep) -> dict[str, Any]:
        """Equal on all ranks; plain values and tensors."""
        parts = self._context.gather_over_data_parallel((list(prepared.rewrite_groups), list(prepared.groups)))
        groups = [group for part in parts for group in part[0]] + [group for part in parts for group in part[1]]
        judged = prepared.judged
        if prepared.judge_ticket is not None:
            judged = self._teacher.peek_groups(prepared.judge_ticket)
        verdicts = self._context.gather_over_data_parallel(judged)
        whole = [part for part in verdicts if part is not None and not part.out_of_order]
        return {
            **self.drawn_state(prepared.drawn),
            "prepared_at": prepared.prepared_at,
            "rollout_s": prepared.rollout_s,
            "candidates": _packed_groups(groups),
            # What some replicas have heard and others not is asked again, the ledger knows those answers; and what the
            # servers failed to answer: a run that is resumed after an outage loses no verdict for it.
            "verdicts": _packed_verdicts(whole) if len(whole) == len(verdicts) and whole else None,
        }

    def drawn_state(self, drawn: DrawnStep) -> dict[str, Any]:
        """Where its samples are. Rewrites are asked for again: what has come of them is in the ledger, if at all."""
        return {
            "step": drawn.step,
            "plan": asdict(drawn.plan),
            "first_window": drawn.first_window,
            "first_sample": drawn.first_sample,
        }

    def drawn_again(self, state: Mapping[str, Any]) -> DrawnStep:
        """Its samples, and their rewrites asked for. Raises ConfigurationError if this number of replicas cannot share
        the step."""
        return self._preparer.with_rewrites(self._redrawn(state))

    def restored(self, state: Mapping[str, Any]) -> PreparedStep:
        """Raises ConfigurationError if this number of replicas cannot share the step."""
        drawn = self._redrawn(state)
        counts = drawn.plan.counts
        rewritten = _unpacked_groups(state["candidates"], drawn.rewritten, self._share(counts["rewrite"]))
        share = [counts["rewrite"] + bound for bound in self._share(counts["rollout"])]
        groups = _unpacked_groups(state["candidates"], drawn.judged, share)
        rollouts = [c for group in groups for c in group.candidates if c.kind is CandidateKind.ROLLOUT]
        judged, ticket = None, None
        if state["verdicts"] is not None:
            judged = self._own_verdicts(state["verdicts"], groups, self._share(counts["rollout"]))
        else:
            # Running statistics have met these groups before they were saved.
            ticket = self._preparer.submit(groups, drawn.step, learn=False)
        return PreparedStep(
            drawn=drawn,
            prepared_at=int(state["prepared_at"]),
            rewrite_groups=rewritten,
            groups=groups,
            judge_ticket=ticket,
            judged=judged,
            rollout_sums=rollout_sums(rollouts, self._eod_id),
            rollout_s=float(state["rollout_s"]),
        )

    def _redrawn(self, state: Mapping[str, Any]) -> DrawnStep:
        plan = StepPlan(**state["plan"])
        self._check_shares(state["step"], plan)
        position = int(state["first_sample"])
        samples: dict[str, list[Sample]] = {}
        for stream in ("suffix", "rewrite", "rollout"):
            samples[stream] = self._at(SUFFIX, position, plan.counts[stream])
            position += plan.counts[stream]
        return DrawnStep(
            step=int(state["step"]),
            plan=plan,
            first_window=int(state["first_window"]),
            first_sample=int(state["first_sample"]),
            windows=self._at(NEXT_TOKEN, int(state["first_window"]), plan.counts["ntp"]),
            suffixes=samples["suffix"],
            rewritten=samples["rewrite"],
            judged=samples["rollout"],
        )

    def _at(self, stream: str, first: int, count: int) -> list[Any]:
        return self._loader.at(stream, first, count, self._context.dp_rank, self._context.dp_size) if count else []

    def _share(self, count: int) -> list[int]:
        """Bounds of this replica's part, as the loader cuts it."""
        rank, size = self._context.dp_rank, self._context.dp_size
        return [count * rank // size, count * (rank + 1) // size]

    def _check_shares(self, step: int, plan: StepPlan) -> None:
        for stream, count in plan.counts.items():
            unit = self._context.dp_size * self._row_sizes[stream]
            if count % unit:
                raise ConfigurationError(
                    f"the checkpoint holds step {step}, prepared ahead with {count} samples of {stream}, which "
                    f"{self._context.dp_size} replicas with micro-batches of {self._row_sizes[stream]} cannot share: "
                    "resume with a data-parallel size or micro-batch size that divides them"
                )

    def _own_verdicts(
        self, packed: Mapping[str, Any], groups: Sequence[CandidateGroup], share: Sequence[int]
    ) -> JudgedGroups:
        """Counts and latencies of all replicas go to the first: they are only ever added up."""
        verdicts = _unpacked_verdicts(packed)[share[0] : share[1]]
        assert [len(v.scores) for v in verdicts] == [len(group.candidates) for group in groups]
        first = self._context.dp_rank == 0
        counts = {name: float(value) if first else 0.0 for name, value in packed["counts"].items()}
        latencies = packed["latencies_s"].numpy() if first else np.zeros(0)
        return JudgedGroups(tuple(verdicts), counts, latencies, float(packed["duration_s"]))


def _packed_groups(groups: Sequence[CandidateGroup]) -> dict[str, torch.Tensor]:
    """``sizes`` [G], ``kinds``, ``rollouts``, ``versions``, ``lengths`` and ``sampled`` [M], ``tokens`` and
    ``log_probs`` [T]. A suffix is a sample's own and has length 0 here."""
    candidates = [candidate for group in groups for candidate in group.candidates]
    stored = [c.tokens if c.kind is not CandidateKind.SUFFIX else c.tokens[:0] for c in candidates]
    scored = [
        np.zeros(len(tokens)) if candidate.sampling_log_probs is None else candidate.sampling_log_probs
        for candidate, tokens in zip(candidates, stored, strict=True)
    ]
    arrays = {
        "sizes": [len(group.candidates) for group in groups],
        "kinds": [_KINDS.index(c.kind) for c in candidates],
        "rollouts": [c.rollout for c in candidates],
        "versions": [c.weight_version for c in candidates],
        "lengths": [len(tokens) for tokens in stored],
        "sampled": [c.sampling_log_probs is not None for c in candidates],
    }
    packed = {name: torch.tensor(values, dtype=torch.int32) for name, values in arrays.items()}
    packed["tokens"] = torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *stored]).astype(np.int32))
    packed["log_probs"] = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *scored]).astype(np.float32))
    return packed


def _unpacked_groups(
    packed: Mapping[str, torch.Tensor], samples: Sequence[Sample], share: Sequence[int]
) -> list[CandidateGroup]:
    """Groups ``share[0]`` to ``share[1]`` of all, which are those of ``samples``."""
    firsts = _ends(packed["sizes"])
    bounds = _ends(packed["lengths"])
    groups = []
    for sample, number in zip(samples, range(*share), strict=True):
        candidates = []
        for c in range(firsts[number], firsts[number + 1]):
            kind, piece = _KINDS[int(packed["kinds"][c])], slice(bounds[c], bounds[c + 1])
            tokens = packed["tokens"][piece].numpy().astype(np.int64)
            candidates.append(
                Candidate(
                    kind,
                    sample.suffix if kind is CandidateKind.SUFFIX else tokens,
                    rollout=int(packed["rollouts"][c]),
                    sampling_log_probs=packed["log_probs"][piece].numpy().copy() if packed["sampled"][c] else None,
                    weight_version=int(packed["versions"][c]),
                )
            )
        groups.append(CandidateGroup(sample, tuple(candidates)))
    return groups


def _packed_verdicts(parts: Sequence[JudgedGroups]) -> dict[str, Any]:
    """Of all replicas: verdicts in their order, sums of the counts."""
    verdicts = [verdict for part in parts for verdict in part.verdicts]
    criteria = sorted({name for verdict in verdicts for name in verdict.criteria})
    flat = {name: np.concatenate([v.criteria[name] for v in verdicts]) for name in criteria}
    counted = [(v.num_calls, v.num_failures, v.num_comparisons) for v in verdicts]
    return {
        "sizes": torch.tensor([len(verdict.scores) for verdict in verdicts], dtype=torch.int32),
        "scores": torch.from_numpy(np.concatenate([verdict.scores for verdict in verdicts])),
        "criteria": {name: torch.from_numpy(values) for name, values in flat.items()},
        "counted": torch.tensor(counted, dtype=torch.int64),
        "group_latencies_s": torch.tensor([verdict.latency_s for verdict in verdicts], dtype=torch.float64),
        "counts": {name: sum(part.counts[name] for part in parts) for name in parts[0].counts},
        "latencies_s": torch.from_numpy(np.concatenate([part.latencies_s for part in parts])),
        "duration_s": max(part.duration_s for part in parts),
    }


def _unpacked_verdicts(packed: Mapping[str, Any]) -> list[GroupVerdict]:
    verdicts = []
    for number, (first, end) in enumerate(pairwise(_ends(packed["sizes"]))):
        calls, failures, comparisons = packed["counted"][number].tolist()
        verdicts.append(
            GroupVerdict(
                packed["scores"][first:end].numpy().copy(),
                {name: values[first:end].numpy().copy() for name, values in packed["criteria"].items()},
                num_calls=calls,
                num_failures=failures,
                num_comparisons=comparisons,
                latency_s=float(packed["group_latencies_s"][number]),
            )
        )
    return verdicts


def _ends(lengths: torch.Tensor) -> list[int]:
    return [0, *np.cumsum(lengths.numpy()).tolist()]
