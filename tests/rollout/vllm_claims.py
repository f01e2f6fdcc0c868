"""What the ranks of a launch do with a vLLM engine; test_vllm_engine.py plays the server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.distributed import ParallelConfig, initialize
from megatron_sip.errors import RolloutError
from megatron_sip.model import ModelConfig, build_model
from megatron_sip.rollout import GenerationRequest, RolloutConfig, SamplingParameters, SeedKey
from megatron_sip.rollout.vllm.engine import VllmEngine, _seed

VOCAB, EOD = 61, 60
PREFIX = [3, 1, 4]


def request(sample: int = 9, step: int = 5) -> GenerationRequest:
    return GenerationRequest(sample, np.array(PREFIX), 3, 6, SeedKey(11, step))


def seed_of(sample: int, step: int) -> int:
    return _seed(request(sample, step))


def play(payload: dict[str, Any]) -> dict[str, Any]:
    """Syncs versions and generates, as the acts say."""
    context = initialize(ParallelConfig(**payload["sizes"]), seed=3)
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    chunks = build_model(model, VOCAB, context)
    options = {"rollout_max_attempts": 4, **payload["options"]}
    config = RolloutConfig(
        rollout_engine="vllm",
        rollout_endpoints=tuple(payload["urls"]),
        rollout_weights_folder=payload["folder"],
        **options,
    )
    engine = VllmEngine(chunks, context, config, model.resolve(), VOCAB, EOD)
    report: dict[str, Any] = {"rollouts": [], "problems": []}
    asked = {
        "generate": request(),
        "next step": request(step=6),
        "greedy": replace(request(), greedy=True),
        "warm": replace(request(), sampling=SamplingParameters(0.7, 0.9, 20)),
    }
    for act in payload["acts"]:
        if act == "refused":
            try:
                engine.sync_weights(0)
            except RolloutError as error:
                report["problems"].append(str(error))
        elif isinstance(act, int):
            engine.sync_weights(act)
        else:
            [group] = engine.generate([asked[act]])
            report["rollouts"].append(
                [
                    {
                        "tokens": one.tokens.tolist(),
                        "log_probs": one.sampling_log_probs.tolist(),
                        "rollout": one.rollout,
                        "version": one.weight_version,
                    }
                    for one in group
                ]
            )
    if not payload["folder"].endswith("file"):
        report["files"] = sorted(path.name for path in Path(payload["folder"]).rglob("*") if path.is_file())
    engine.close()
    return report
