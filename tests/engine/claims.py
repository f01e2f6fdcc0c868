"""What the ranks run: the fixed stream of rows through the engine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.engine.config import EngineConfig
from megatron_sip.engine.engine import Engine
from megatron_sip.errors import SIPError
from megatron_sip.model import ModelConfig, build_model
from megatron_sip.objectives import NextToken, ObjectiveConfig, OnlineDPO, SuffixNLL
from megatron_sip.types import Objective, RowBatch, RowLayout, TrainPass
from tests.engine.rows import NTP_LAYOUT, PAIR_LAYOUT, SUFFIX_LAYOUT, VOCAB, draw_rows, micro_batches

STREAMS: dict[str, tuple[RowLayout, Objective]] = {
    "lm loss": (NTP_LAYOUT, NextToken()),
    "loss/rf_nll": (SUFFIX_LAYOUT, SuffixNLL("rf_nll")),
    "loss/dpo": (PAIR_LAYOUT, OnlineDPO(beta=0.5)),
}


def start(payload: dict[str, Any]) -> tuple[ParallelContext, Engine]:
    """The job and an engine with freshly drawn weights."""
    context = initialize(ParallelConfig(**payload.get("parallel", {})), seed=payload["seed"])
    return context, new_engine(payload, context)


def new_engine(payload: dict[str, Any], context: ParallelContext) -> Engine:
    """An engine with freshly drawn weights."""
    chunks = build_model(ModelConfig(**payload["model"]), VOCAB, context)
    config = EngineConfig(
        lr=payload["lr"],
        lr_decay_style="constant",
        lr_warmup_iters=2,
        weight_decay=0.1,
        adam_beta2=0.95,
        adam_eps=1e-6,
        **payload.get("engine", {}),
    )
    return Engine(chunks, config, ObjectiveConfig(**payload.get("objective", {})), context, train_iters=100)


def batches_of(context: ParallelContext, step: int, layout: RowLayout, size: int) -> tuple[RowBatch, ...]:
    """This replica's rows."""
    rows = draw_rows(step, layout)[context.dp_rank :: context.dp_size]
    return micro_batches(rows, layout, size)


def one_step(engine: Engine, context: ParallelContext, step: int, payload: dict[str, Any]) -> dict[str, float]:
    """Two or three passes of as many shapes, one optimizer step."""
    engine.begin_step()
    streams = {name: stream for name, stream in STREAMS.items() if draw_rows(step, stream[0])}
    for number, (name, (layout, objective)) in enumerate(streams.items()):
        batches = batches_of(context, step, layout, payload["micro_batch_size"])
        if objective.needs_reference:
            scored = engine.score(batches, "reference")
            batches = tuple(replace(b, reference_log_probs=s) for b, s in zip(batches, scored, strict=True))
        units = context.sum_over_data_parallel({"units": sum(objective.units(b) for b in batches)})["units"]
        scale = payload["weights"][name] / units
        engine.run(TrainPass(name, batches, objective, scale), last=number == len(streams) - 1)
    metrics = {name: total / count for name, (total, count) in engine.collect_metrics().items()}
    result = engine.optimizer_step()
    return {**{name: metrics[name] for name in streams}, "grad-norm": result.grad_norm}


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradient norms and the parameter norm of ``payload["steps"]`` steps."""
    context, engine = start(payload)
    history = [one_step(engine, context, step, payload) for step in range(payload["steps"])]
    evaluated = engine.evaluate(TrainPass("v", batches_of(context, 9, NTP_LAYOUT, 1), NextToken("v"), 0.0))
    scores = engine.score(batches_of(context, 9, PAIR_LAYOUT, 1))
    gathered = context.gather_over_data_parallel([score.tolist() for score in scores])
    return {
        "history": history,
        "params-norm": engine.parameter_norm(),
        "validation": evaluated["v"],
        "scores": list(itertools.chain.from_iterable(gathered)),
    }


def save_and_go_on(payload: dict[str, Any]) -> dict[str, Any]:
    """Saves after two steps; returns the four that follow, straight on and after a load into a new engine."""
    from megatron.core import dist_checkpointing

    context, engine = start(payload)
    for step in range(2):
        one_step(engine, context, step, payload)
    dist_checkpointing.save(engine.sharded_state_dict(), payload["directory"])
    common = engine.common_state()
    straight = [one_step(engine, context, step, payload) for step in range(2, 6)]
    again = new_engine(payload, context)
    return {"common": common, "straight": straight, "resumed": _load_and_go_on(again, common, context, payload)}


def go_on(payload: dict[str, Any]) -> list[dict[str, float]]:
    """Loads what ``save_and_go_on`` saved, in another layout, and goes on for four steps."""
    context, engine = start(payload)
    return _load_and_go_on(engine, payload["common"], context, payload)


def _load_and_go_on(
    engine: Engine, common: dict[str, int], context: ParallelContext, payload: dict[str, Any]
) -> list[dict[str, float]]:
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.125)  # nothing can be right by chance
    engine.reset_reference()
    engine.load_state_dict(dist_checkpointing.load(engine.sharded_state_dict(is_loading=True), payload["directory"]))
    engine.load_common_state(common)
    return [one_step(engine, context, step, payload) for step in range(2, 6)]


def load_weights_alone(payload: dict[str, Any]) -> dict[str, Any]:
    """Loads only the model: the optimizer starts anew from its weights, and so does the reference."""
    from megatron.core import dist_checkpointing

    context, engine = start(payload)
    state = engine.sharded_state_dict(is_loading=True, optimizer=False, reference=False)
    before = torch.cat(engine.score(batches_of(context, 7, PAIR_LAYOUT, 2)))
    loaded_state = dist_checkpointing.load(state, payload["directory"])
    loaded_state.pop("optimizer")  # its common part, which Megatron adds unasked
    engine.load_state_dict(loaded_state)
    loaded = torch.cat(engine.score(batches_of(context, 7, PAIR_LAYOUT, 2)))
    reference = torch.cat(engine.score(batches_of(context, 7, PAIR_LAYOUT, 2), "reference"))
    weights = _weights(engine)
    engine.begin_step()
    engine.optimizer_step()  # no gradient, and a learning rate of 0: main weights that lag behind would show
    kept = all(torch.equal(a, b) for a, b in zip(weights, _weights(engine), strict=True))
    try:
        engine.sharded_state_dict(is_loading=True, metadata={"distrib_optim_sharding_type": "dp_reshardable"})
        refusal = ""
    except SIPError as failure:
        refusal = str(failure)
    return {
        "refusal of another format": refusal,
        "changed": not torch.equal(before, loaded),
        "reference follows": torch.equal(loaded, reference),
        "weights kept": kept,
    }


def mean_change(payload: dict[str, Any]) -> float:
    """Mean absolute change of the weights over ten steps on one batch."""
    context, engine = start(payload)
    before = _weights(engine)
    for _ in range(10):
        _next_token_step(engine, context, 0.1)
    changes = [(a.float() - b.float()).abs().flatten() for a, b in zip(before, _weights(engine), strict=True)]
    return float(torch.cat(changes).mean())


def skip_nan(payload: dict[str, Any]) -> dict[str, Any]:
    """A NaN on one replica only, then a good step, then NaN until the engine gives up."""
    context, engine = start(payload)
    before = _weights(engine)
    poisoned = _next_token_step(engine, context, float("nan") if context.dp_rank == 0 else 0.1)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, _weights(engine), strict=True))
    counts = (engine.num_updates, engine.num_skipped)
    good = [_next_token_step(engine, context, 0.1) for _ in range(2)]
    error = ""
    try:
        for _ in range(3):
            _next_token_step(engine, context, float("inf"))
    except SIPError as failure:
        error = str(failure)
    return {
        "skipped": poisoned.skipped,
        "unchanged": unchanged,
        "counts": counts,
        "good": [(step.skipped, step.grad_norm) for step in good],
        "error": error,
    }


def _next_token_step(engine: Engine, context: ParallelContext, scale: float) -> Any:
    engine.begin_step()
    engine.run(TrainPass("ntp", batches_of(context, 0, NTP_LAYOUT, 1), NextToken(), scale), last=True)
    return engine.optimizer_step()


def _weights(engine: Engine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]


def references(payload: dict[str, Any]) -> dict[str, Any]:
    """Scores under the reference after each of four steps, for every kind and place of it, and its weights."""
    context = initialize(ParallelConfig(), seed=payload["seed"])
    found: dict[str, Any] = {}
    for kind, place in itertools.product(("frozen", "synced", "ema"), ("device", "host")):
        options = {"reference_policy": kind, "reference_placement": place, "reference_sync_interval": 2}
        engine = new_engine({**payload, "objective": {**options, "reference_ema_decay": 0.75}}, context)
        probe = batches_of(context, 7, PAIR_LAYOUT, 2)
        policy, reference, versions, weights = [], [], [], [_weights(engine)]
        for step in range(5):
            policy.append(torch.cat(engine.score(probe)))
            reference.append(torch.cat(engine.score(probe, "reference")))
            versions.append(engine.reference_version)
            if step < 4:
                one_step(engine, context, step, payload)
                weights.append(_weights(engine))
        found[f"{kind} {place}"] = {
            "policy": [scores.tolist() for scores in policy],
            "reference": [scores.tolist() for scores in reference],
            "versions": versions,
            "first weight": [step[0].flatten()[:5].tolist() for step in weights],
            "first reference": _reference_weight(engine),
        }
    return found


def _reference_weight(engine: Engine) -> list[float]:
    name, entry = next(iter(engine.sharded_state_dict()["reference"]["chunk0"].items()))
    assert name == "embedding.word_embeddings.weight"
    return list(entry.data.flatten()[:5].tolist())
