"""What the ranks of a launch roll out through a real server, and what the training ranks themselves would."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sip.distributed import ParallelConfig, initialize
from megatron_sip.huggingface.config_json import architecture_of, read_config
from megatron_sip.rollout import GenerationRequest, InProcessEngine, RolloutConfig, SamplingParameters, SeedKey
from megatron_sip.rollout.vllm.engine import VllmEngine
from megatron_sip.types import Candidate
from tests.interop.claims import load_recipe

PREFIX_LENGTHS = (5, 1, 140, 17)  # one fills more than a block of the prefix cache
NEW_TOKENS = 12


def requests(vocab_size: int, step: int = 3, **changes: Any) -> list[GenerationRequest]:
    generator = np.random.default_rng(0)
    prefixes = [generator.integers(0, vocab_size, length) for length in PREFIX_LENGTHS]
    return [
        GenerationRequest(100 + index, prefix, 3, NEW_TOKENS, SeedKey(11, step), **changes)
        for index, prefix in enumerate(prefixes)
    ]


def roll_out(payload: dict[str, Any]) -> dict[str, Any]:
    """Greedy and sampled rollouts by both engines, at the first weights and after a change of them."""
    context = initialize(ParallelConfig(**payload["sizes"]), seed=1)
    root = Path(payload["root"])
    chunks, _, _ = load_recipe(root, context)
    size = chunks[0].num_tokens
    architecture = architecture_of(read_config(root / "huggingface"), root)
    eod = payload["eod"]
    config = RolloutConfig(
        rollout_engine="vllm",
        rollout_endpoints=(payload["url"],),
        rollout_weights_folder=payload["folder"],
        rollout_sync_interval=payload["interval"],
        rollout_weight_transfer=payload["transfer"],
    )
    theirs = VllmEngine(chunks, context, config, architecture, size, eod)
    ours = InProcessEngine(chunks, context, RolloutConfig(), size, eod)
    report: dict[str, Any] = {}
    for version in payload["versions"]:
        ours.sync_weights(version)
        started = time.perf_counter()
        theirs.sync_weights(version)
        report[f"sync_s {version}"] = time.perf_counter() - started
        for name, asked in {
            "greedy": requests(size, greedy=True),
            "sampled": requests(size),
            "again": requests(size)[::-1],
            "warm": requests(size, sampling=SamplingParameters(temperature=0.7, top_p=0.9, top_k=20)),
            "next step": requests(size, step=4),
        }.items():
            report[f"{name} {version}"] = [[plain(one) for one in group] for group in theirs.generate(asked)]
        report[f"ours {version}"] = [
            [plain(one) for one in group] for group in ours.generate(requests(size, greedy=True))
        ]
        report[f"nothing {version}"] = theirs.generate([replace(requests(size)[0], num_rollouts=0)])
        with torch.no_grad():  # the next weights: another policy, the same at every layout
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.add_(0.1 * torch.sin(50 * parameter))
    theirs.close()
    if context.rank == 0:  # the one that removes them
        report["left"] = sorted(path.name for path in Path(payload["folder"]).iterdir())
    return report


def plain(candidate: Candidate) -> tuple[list[int], list[float], int, int]:
    assert candidate.sampling_log_probs is not None
    return (
        candidate.tokens.tolist(),
        candidate.sampling_log_probs.tolist(),
        candidate.rollout,
        candidate.weight_version,
    )
