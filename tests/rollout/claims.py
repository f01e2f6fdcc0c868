"""What the ranks of one layout generate; test_layouts.py says what it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.model import CausalPlan, ModelConfig, ScoreTargets, build_model
from megatron_sip.rollout import (
    GenerationRequest,
    InProcessEngine,
    RolloutConfig,
    SamplingParameters,
    SeedKey,
    VocabParallelSampler,
    lane,
)
from megatron_sip.rollout.cache import JointCache, RolloutCache
from megatron_sip.types import Candidate
from tests.rollout.dense import Shape
from tests.rollout.recorder import CaptureByReplay

SHAPE = Shape()
EOD = 68
SEED_KEY = SeedKey(seed=11, step=5)
PREFIX_LENGTHS = (9, 1, 14, 5, 9, 22)
LIMITS = (12, 4, 3, 12, 9, 12)  # two groups leave early: the batch is compacted
NUM_ROLLOUTS = (3, 3, 2, 3, 1, 3)
WARM = SamplingParameters(temperature=1.3, top_p=0.9, top_k=20)


@dataclass(frozen=True)
class Generated:
    """A rollout that pickles."""

    tokens: list[int]
    log_probs: list[float]
    rollout: int
    weight_version: int


def requests(**changes: Any) -> list[GenerationRequest]:
    """Six prefixes of ragged length, with ragged numbers of rollouts and limits."""
    generator = np.random.default_rng(0)
    return [
        GenerationRequest(
            sample_id=100 + index,
            prefix=generator.integers(0, SHAPE.vocab, length),
            num_rollouts=count,
            max_new_tokens=limit,
            seed_key=SEED_KEY,
            **changes,
        )
        for index, (length, limit, count) in enumerate(zip(PREFIX_LENGTHS, LIMITS, NUM_ROLLOUTS, strict=True))
    ]


def generate_all(layout: tuple[ParallelConfig, str]) -> dict[str, Any]:
    """Every case of one layout, on one rank of it; the second part is ``rollout_weights``."""
    parallel, rollout_weights = layout
    context = initialize(parallel, seed=3)
    config = ModelConfig(
        num_layers=SHAPE.num_layers,
        hidden_size=SHAPE.hidden,
        num_attention_heads=SHAPE.heads,
        num_query_groups=SHAPE.groups,
        ffn_hidden_size=SHAPE.ffn,
        rotary_base=SHAPE.rope_base,
        norm_epsilon=SHAPE.epsilon,
        init_method_std=0.25,  # far from uniform: greedy margins are wide against rounding
    )
    chunks = build_model(config, SHAPE.vocab, context)

    def engine(**options: Any) -> InProcessEngine:
        made = InProcessEngine(
            chunks, context, RolloutConfig(rollout_weights=rollout_weights, **options), SHAPE.vocab, EOD
        )
        made.sync_weights(42)
        return made

    unbounded, sampled = engine(rollout_stop_at_eod=False), requests()
    few_at_once = engine(rollout_stop_at_eod=False, rollout_batch_size=4)
    results: dict[str, Any] = {
        "greedy": unbounded.generate(requests(greedy=True)),
        "sampled": unbounded.generate(sampled),
        "small batches": few_at_once.generate(sampled[::-1])[::-1],
        "eod": engine().generate(sampled),
        "warm": unbounded.generate(requests(sampling=WARM)),
        "many": engine(rollout_batch_size=400).generate(many_requests()),
        "next step": unbounded.generate([replace(request, seed_key=SeedKey(11, 6)) for request in sampled]),
    }
    results["refilled"], num_joined = _watch_blocks(lambda: engine(rollout_batch_size=8).generate(many_requests()))
    recorder = CaptureByReplay()
    if context.world_size == 1:
        captured = InProcessEngine(
            chunks, context, RolloutConfig(rollout_stop_at_eod=False), SHAPE.vocab, EOD, capture=recorder
        )
        captured.sync_weights(42)
        results["captured"] = captured.generate(sampled)
        results["captured, longer"] = captured.generate(many_requests())
        results["longer"] = unbounded.generate(many_requests())
    for chunk in chunks:  # a norm that the lean path does not know: decoding goes through the modules
        for layer in chunk.decoder.layers:
            layer.pre_mlp_layernorm = torch.nn.Sequential(layer.pre_mlp_layernorm)
    rollout_weights = "sharded"
    results["by modules"] = engine(rollout_stop_at_eod=False).generate(sampled)
    plain = {name: [[_plain(rollout) for rollout in group] for group in groups] for name, groups in results.items()}
    plain["training"] = [chunk.training for chunk in chunks]
    plain["nothing"] = unbounded.generate([replace(sampled[0], num_rollouts=0)])
    plain["sampler"] = _sample_split_logits(context)
    plain["blocks decoded together"] = num_joined
    plain["captures and replays"] = recorder.num_captures, recorder.num_replays
    if context.world_size == 1:
        plain["weights"] = {
            name.replace("layernorm.0.", "layernorm."): value.detach().double().numpy()
            for name, value in chunks[0].named_parameters()
        }
        plain["other architecture"] = _rescore_other_architecture(context)
    return plain


def many_requests() -> list[GenerationRequest]:
    """Twenty prefixes with one to four rollouts; many end early (EOD is likely)."""
    generator = np.random.default_rng(1)
    return [
        GenerationRequest(
            sample_id=300 + index,
            prefix=generator.integers(0, SHAPE.vocab, 3 + index % 7),
            num_rollouts=1 + index % 4,
            max_new_tokens=40,
            seed_key=SEED_KEY,
        )
        for index in range(20)
    ]


def _watch_blocks(generate: Callable[[], list[list[Candidate]]]) -> tuple[list[list[Candidate]], int]:
    """What was generated, and the largest number of blocks that were decoded in one pass."""
    seen = []

    class Watched(JointCache):
        def __init__(self, caches: Sequence[RolloutCache]) -> None:
            super().__init__(caches)
            seen.append(len(caches))

    with mock.patch.object(lane, "JointCache", Watched):
        return generate(), max(seen)


def _rescore_other_architecture(context: ParallelContext) -> list[tuple[list[float], list[float]]]:
    """Log-probs of rollouts as sampled, and by the model's own forward over whole sequences."""
    config = ModelConfig(
        num_layers=2, hidden_size=24, num_attention_heads=6, num_query_groups=3, ffn_hidden_size=20,
        add_qkv_bias=True, qk_layernorm=True, untie_embeddings_and_output_weights=False, init_method_std=0.3,
    )  # fmt: skip
    [model] = build_model(config, SHAPE.vocab, context)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as 1 and 0, which would hide a mistake
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    pairs = []
    asked = requests()
    for request, group in zip(
        asked, InProcessEngine([model], context, RolloutConfig(), SHAPE.vocab, EOD).generate(asked), strict=True
    ):
        for rollout in group:
            row = torch.from_numpy(np.concatenate([request.prefix, rollout.tokens]))[None]
            scored = torch.arange(len(request.prefix) - 1, row.shape[1] - 1)[None]
            targets = ScoreTargets(targets=row[:, scored[0] + 1], sources=scored)
            with torch.no_grad():
                log_probs = model(row, torch.arange(row.shape[1])[None], CausalPlan(), targets)
            pairs.append((_plain(rollout).log_probs, log_probs[0].tolist()))
    return pairs


def _plain(candidate: Candidate) -> Generated:
    assert candidate.sampling_log_probs is not None
    return Generated(
        candidate.tokens.tolist(), candidate.sampling_log_probs.tolist(), candidate.rollout, candidate.weight_version
    )


def _sample_split_logits(context: ParallelContext) -> list[list[int]]:
    """Tokens for 2000 rows of given logits under several parameters, also where the last rank holds padding only."""
    drawn = []
    for vocab, padded in ((1000, 1024), (60, 128)):
        logits = torch.randn(2000, padded, generator=torch.Generator().manual_seed(1)) * 2
        logits[:, vocab:] = 30.0
        share = logits.chunk(context.tp_size, dim=1)[context.tp_rank]
        uniforms = torch.rand(2000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        sampler = VocabParallelSampler(vocab, context.tp_group, context.tp_rank, context.tp_size)
        for parameters in (
            SamplingParameters(),
            SamplingParameters(temperature=0.0),
            SamplingParameters(top_k=30),
            SamplingParameters(temperature=2.0, top_p=0.95),
            WARM,
        ):
            drawn.append(sampler.sample(share, uniforms, parameters)[0].tolist())
    return drawn


def generate_after_a_split_update(_: None) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy tokens after each of two replicas has changed its shard of the weights, and after one has changed all."""
    context = initialize(ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), seed=3)
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, init_method_std=0.25)
    [model], [whole] = (build_model(config, SHAPE.vocab, context) for _ in range(2))
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        ),
        module=model,
    )
    with torch.no_grad():
        for group in wrapped.bucket_groups:
            for bucket in group.buckets:
                bucket.param_data.chunk(context.dp_size)[context.dp_rank].mul_(1.5)
        for parameter in whole.parameters():
            parameter.mul_(1.5)

    def greedy(chunk: torch.nn.Module) -> list[list[int]]:
        engine = InProcessEngine([chunk], context, RolloutConfig(), SHAPE.vocab, EOD)
        engine.sync_weights(1)
        return [group[0].tokens.tolist() for group in engine.generate(requests(greedy=True))]

    return greedy(wrapped), greedy(whole)
