"""What the log says of a step's candidates and verdicts. All of these are collective over data parallel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_sip.distributed import ParallelContext
from megatron_sip.rollout import CandidatePool
from megatron_sip.rollout.statistics import rollout_scalars
from megatron_sip.teacher.convert import rewriter_sums
from megatron_sip.teacher.http.failures import KINDS, REMOTE_COUNTS
from megatron_sip.train.prepare import PreparedStep
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.train.verdicts import Verdicts
from megatron_sip.types import CandidateKind


def judge_scalars(context: ParallelContext, verdicts: Verdicts) -> dict[str, float]:
    """Of a step's verdicts, over all replicas."""
    judged = verdicts.judged
    own = dict(judged.counts)
    own["groups"] = float(len(judged.verdicts))
    own["comparisons"] = float(sum(verdict.num_comparisons for verdict in judged.verdicts))
    sums = context.sum_over_data_parallel(own)
    gathered = context.gather_over_data_parallel((judged.latencies_s, judged.duration_s, verdicts.exposed_wait_s))
    latencies_s = np.concatenate([latencies for latencies, _, _ in gathered])
    duration_s = max(duration for _, duration, _ in gathered)
    exposed_s = max(exposed for _, _, exposed in gathered)
    scalars = {
        "judge/calls": sums["calls"],
        "judge/cached": sums["cached"],
        "judge/failure_rate": sums["failures"] / max(sums["calls"], 1.0),
        "judge/parse_fail_rate": sums["failures_unparsable"] / max(sums["calls"], 1.0),
        "judge/comparisons_per_prompt": sums["comparisons"] / max(sums["groups"], 1.0),
        "judge/exposed_wait_s": exposed_s,
    }
    if duration_s:
        scalars["judge/duration_s"] = duration_s
        scalars["judge/hidden_fraction"] = 1.0 - min(1.0, exposed_s / duration_s)
    if verdicts.headroom_s is not None:
        scalars["judge/headroom_s"] = verdicts.headroom_s
    if verdicts.num_pauses:
        scalars.update({"judge/pauses": float(verdicts.num_pauses), "judge/paused_s": verdicts.paused_s})
    # Steps overlap: the attempts of a step's requests may fall into another one's counts than the requests.
    remote = {f"judge/{name}": sums[f"remote_{name}"] for name in REMOTE_COUNTS}
    if any(remote.values()):
        scalars.update(remote)
    if any(remote.values()) or sums["failures"]:
        scalars.update({f"judge/failures_{kind}": sums[f"failures_{kind}"] for kind in KINDS})
    if sums["both_orders"]:
        scalars["judge/position_flip_rate"] = sums["flips"] / sums["both_orders"]
    for percent in (50, 90, 99):
        if latencies_s.size:
            scalars[f"judge/latency_p{percent}_s"] = float(np.quantile(latencies_s, percent / 100))
    return scalars


def queue_scalars(context: ParallelContext, link: TeacherLink, num_ahead: int) -> dict[str, float]:
    """Before training on a step: steps prepared beyond it, and batches that the slowest teacher has not answered."""
    tickets = max(context.gather_over_data_parallel(context.broadcast_object(link.num_out)))
    return {"lookahead/steps_ahead": float(num_ahead), "judge/open_batches": float(tickets)}


def candidate_scalars(context: ParallelContext, prepared: PreparedStep, pool: CandidatePool) -> dict[str, float]:
    """Of the rollouts and rewrites that a step was prepared with."""
    scalars: dict[str, float] = {}
    if prepared.groups and pool.num_rollouts:
        sums = context.sum_over_data_parallel(prepared.rollout_sums)
        scalars.update(rollout_scalars(sums, prepared.rollout_s))
    groups = [*prepared.rewrite_groups, *(prepared.groups if pool.rewrite else ())]
    if groups:
        rewrites = [next((c for c in g.candidates if c.kind is CandidateKind.REWRITE), None) for g in groups]
        own = rewriter_sums([group.sample for group in groups], rewrites)
        flat = {f"{part} {name}": pair[part] for name, pair in own.items() for part in (0, 1)}
        sums = context.sum_over_data_parallel(flat)
        scalars.update(ratios({name: (sums[f"0 {name}"], sums[f"1 {name}"]) for name in own}))
    if prepared.rewrite_wait_s is not None:
        scalars["rewriter/exposed_wait_s"] = prepared.rewrite_wait_s
    return scalars


def staleness_scalars(prepared: PreparedStep, num_updates: int) -> dict[str, float]:
    """How far behind the policy was that a step's rollouts came from; not collective.

    ``num_updates``: optimizer steps behind the weights that are now trained. Steps skipped for a NaN change no weights,
    so that the distance in weight versions may be smaller than that in steps.
    """
    versions = [c.weight_version for group in prepared.groups for c in group.candidates if c.weight_version >= 0]
    if not prepared.groups:
        return {}
    scalars = {"policy/staleness_steps": float(prepared.step - prepared.prepared_at)}
    if versions:
        scalars["policy/staleness_versions"] = float(num_updates - min(versions))
    return scalars


def ratios(metrics: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """What was counted nowhere is left out rather than reported as 0."""
    return {name: total / count for name, (total, count) in metrics.items() if count}
