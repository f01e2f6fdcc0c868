#!/usr/bin/env python
"""Seconds until a vLLM server on this machine's CPUs answers from new weights, by each transfer and layout.

    python benchmarks/weight_sync.py --vllm-python .venv-vllm-cpu/bin/python

Beside it what works without a transfer: the policy is saved as a checkpoint of transformers' and the server is started
anew on it (``save_pretrained``, SIGTERM, ``vllm ...``, until /health answers). The first hand-over of a run looks at
the server and joins its group; it stands apart. After the last one greedy tokens are compared with those of the
in-process engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.pairs import machine, report
from tests.ranks import run_ranks
from tests.vllm.server import VllmServer, free_port, printed_server
from tools.export_policy import parse as parse_export
from tools.export_policy import serve_command

MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
    "56M": {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
    },
}  # fmt: skip
PROMPTS, NEW_TOKENS = 4, 12


def measure(payload: dict[str, Any]) -> dict[str, Any]:
    """On each rank: seconds of every hand-over, between barriers, and how many greedy tokens agree."""
    import torch.distributed as dist

    from megatron_sip.distributed import ParallelConfig, initialize
    from megatron_sip.huggingface.config_json import architecture_of, read_config
    from megatron_sip.model import build_model
    from megatron_sip.rollout import InProcessEngine, RolloutConfig
    from megatron_sip.rollout.vllm.engine import VllmEngine
    from megatron_sip.train.weights import model_config_of

    context = initialize(ParallelConfig(tensor_model_parallel_size=payload["tp"]), seed=1)
    folder, size = Path(payload["model"]), payload["vocab_size"]
    architecture = architecture_of(read_config(folder), folder)
    chunks = build_model(model_config_of(architecture), size, context)
    options = RolloutConfig(
        rollout_engine="vllm",
        rollout_endpoints=(payload["url"],),
        rollout_weight_transfer=payload["transfer"],
        rollout_stop_at_eod=False,
    )
    servers = VllmEngine(chunks, context, options, architecture, size, eod=0)
    seconds = []
    for version in range(payload["syncs"] + 1):
        dist.barrier()
        started = time.perf_counter()
        servers.sync_weights(version)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        if version < payload["syncs"]:
            _change(chunks)
    in_process = InProcessEngine(chunks, context, RolloutConfig(rollout_stop_at_eod=False), size, eod=0)
    in_process.sync_weights(payload["syncs"])
    asked = _greedy_requests(size)
    pairs = zip(servers.generate(asked), in_process.generate(asked), strict=True)
    same = sum(int((theirs.tokens == ours.tokens).sum()) for [theirs], [ours] in pairs)
    servers.close()
    return {"seconds": seconds, "same": same}


def _change(chunks: list[Any]) -> None:
    """The next weights: the same at every layout."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.add_(0.1 * torch.sin(50 * parameter))


def _greedy_requests(vocab_size: int) -> list[Any]:
    from megatron_sip.rollout import GenerationRequest, SeedKey

    prefixes = torch.randint(0, vocab_size, (PROMPTS, 40), generator=torch.Generator().manual_seed(5)).numpy()
    return [
        GenerationRequest(number, prefix, 1, NEW_TOKENS, SeedKey(1, 0), greedy=True)
        for number, prefix in enumerate(prefixes)
    ]


def save(model: Any, folder: Path) -> float:
    """Seconds of transformers' ``save_pretrained``."""
    started = time.perf_counter()
    model.save_pretrained(folder)
    return time.perf_counter() - started


def serving_line(folder: Path, config: Any, port: int) -> str:
    """What tools/export_policy.py prints for a server that takes weights both ways."""
    from megatron_sip.checkpoint.huggingface.convert import Converted
    from megatron_sip.huggingface.config_json import architecture_of, read_config

    flags = ["-", str(folder), "--for-rollouts", "--cpu", "--weight-transfer", "gloo", "--port", str(port)]
    architecture = architecture_of(read_config(folder), folder)
    size = config.vocab_size
    return serve_command(Converted(folder, architecture, size, size, torch.float32, False), parse_export(flags))


def run_model(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one model: the restarts, then each transfer at each layout."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**MODELS[name], tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).float()
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    common = {"model": name, "parameters": num_bytes // 4, "mib": num_bytes / 2**20}
    rows, restarts = [], []
    for number in range(options.restarts + 1):
        with ExitStack() as stack:
            port, directory = free_port(), folder / f"{name}-{number}"
            saved_s, started = save(model, directory), time.perf_counter()
            line = serving_line(directory, config, port)
            server = stack.enter_context(
                printed_server(line, options.vllm_python, directory, port, folder / f"{name}-{number}.log")
            )
            start_s = time.perf_counter() - started
            if number == options.restarts:
                rows += transfers(common, server, directory, options)
            ending = time.perf_counter()
            stack.close()
            restarts.append(saved_s + start_s + time.perf_counter() - ending)
    restart = {**common, "way": "checkpoint and restart", "layout": "-", "first_s": None, "same": None}
    rows.append(_with_spread(restart, restarts))
    for row in rows:
        row["restart_over_this"] = statistics.median(restarts) / row["median_s"]
    return rows


def transfers(
    common: dict[str, Any], server: VllmServer, directory: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one server."""
    rows = []
    for transfer in options.transfers:
        for tp in options.tensor_parallel:
            payload = {"tp": tp, "model": str(directory), "url": server.root, "transfer": transfer}
            payload |= {"syncs": options.syncs, "vocab_size": MODELS[common["model"]]["vocab_size"]}
            found = run_ranks(tp, "benchmarks.weight_sync:measure", payload, timeout_s=600.0)[0]
            first, *later = found["seconds"]
            row = {**common, "way": transfer, "layout": f"{tp}x1", "first_s": first, "same": found["same"]}
            rows.append(_with_spread(row, later))
    return rows


def _with_spread(row: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    return {**row, "median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds),
            "seconds": seconds}  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    first = "" if row["first_s"] is None else f"{row['first_s']:.2f}"
    same = "" if row["same"] is None else f"{row['same']} of {PROMPTS * NEW_TOKENS}"
    print(
        f"| {row['model']} | {row['mib']:.0f} | {row['way']} | {row['layout']} | {first} | {row['median_s']:.3f} "
        f"| {row['min_s']:.3f}-{row['max_s']:.3f} | {len(row['seconds'])} | {same} | {row['restart_over_this']:.0f} |",
        flush=True,
    )


def main() -> None:
    """Measures every combination of the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="interpreter of the environment that has vLLM")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--transfers", nargs="+", choices=("files", "gloo"), default=["files", "gloo"])
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2], help="ranks of the trainer [1 2]")
    parser.add_argument("--syncs", type=int, default=7, help="hand-overs after the first [7]")
    parser.add_argument("--restarts", type=int, default=2, help="more starts of the server than one [2]")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    print(machine(), flush=True)
    print("| model | MiB | way | TPxPP | first, s | median s | range, s | n | greedy tokens equal | restart / this |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            found = run_model(name, options, Path(folder))
        for row in found:
            show(row)
        rows += found
    report(options.json, rows, vars(options))


if __name__ == "__main__":
    main()
