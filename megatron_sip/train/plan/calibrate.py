"""``tools/plan.py --calibrate``: measures this machine by short runs and writes its hardware file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_sip.config import to_yaml
from megatron_sip.distributed import ParallelConfig, device_memory_bytes, initialize, linear, synchronize
from megatron_sip.errors import ConfigurationError
from megatron_sip.files import require_folder_of, write_text
from megatron_sip.train.plan import costs
from megatron_sip.train.plan.fit import Sample, fit_pace, predicted
from megatron_sip.train.plan.hardware import DeviceConfig, EfficiencyConfig, Hardware, LinkConfig
from megatron_sip.train.plan.runs import Measured, measure
from megatron_sip.train.plan.speed import Pace, seconds_by_cause
from megatron_sip.train.plan.trial import run_trial, trial_environment, write_trial

_GEMMS = {"cpu": (512, 1024), "cuda": (4096, 8192)}
_COPY_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
"""On CPU what caches hold, since that is where the activations of a small model are."""
_VOCABULARY, _TRIAL = 500, {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "train_iters": 8,
    "global_batch_size": 16, "micro_batch_size": 8, "seq_length": 64, "suffix_length": 16, "min_prefix_length": 16,
    "candidates": "suffix,rollout:6", "curriculum": "ntp=0.5,rollout=0.5",
}  # fmt: skip


_JUDGED_TOKENS = 8 * 7 * 16
"""Of its step: half of 16 samples, 7 candidates, 16 tokens."""


def calibrate(path: Path, arguments: Sequence[str]) -> None:
    """Measures and writes ``path``; prints what it does and how well the fit meets its own measurements.

    Raises:
        ConfigurationError: further flags.
        DataError: a folder that does not exist, or a file that cannot be written.
    """
    if arguments:
        raise ConfigurationError(f"--calibrate takes no other flags, not {' '.join(arguments)}: the runs are its own")
    require_folder_of(path, "--calibrate")
    context = initialize(ParallelConfig(), seed=1)
    on_gpu = context.device.type == "cuda"
    _say("peaks of products and copies")
    device = _device(context.device)
    measured = measure(context, bf16=on_gpu, say=_say)
    paces = {kind: fit_pace(samples, device) for kind, samples in measured.samples.items()}
    for kind, samples in measured.samples.items():
        _say(f"{kind:9} {_quality(samples, device, paces[kind])}")
    _say("ranks beside each other")
    ranks = _two_ranks()
    _say("a whole training")
    values = {**_efficiencies(paces), **_trial_figures(device, paces["optimizer"]), "busy_slowdown": ranks["slowdown"]}
    bandwidth, latency = _short(ranks["bandwidth_gb_s"]), _short(ranks["latency_us"])
    link = LinkConfig(bandwidth, latency, bandwidth, latency)
    hardware = Hardware(
        device=device, link=link, efficiency=EfficiencyConfig(**{name: _short(v) for name, v in values.items()}),
        name=_name(context.device), sources=_sources(measured, device, paces),
    )  # fmt: skip
    hardware.efficiency.validate()
    hardware.validate()
    write_text(path, f"# Written by tools/plan.py --calibrate on {date.today()}.\n{to_yaml(hardware)}")
    _say(f"wrote {path}")
    context.shutdown()


def _say(text: str) -> None:
    print(f"calibration: {text}", flush=True)


def _device(device: torch.device) -> DeviceConfig:
    kind, dtype = device.type, torch.float32 if device.type == "cpu" else torch.bfloat16
    flops = 0.0
    for size in _GEMMS[kind]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        flops = max(flops, 2 * size**3 / _fastest(lambda a=a, b=b: linear(a, b), device))
    source = torch.zeros(_COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / _fastest(lambda: target.copy_(source), device)
    memory = device_memory_bytes(device)
    cores = os.cpu_count() or 1
    memory = psutil.virtual_memory().total // cores if memory is None else memory
    return DeviceConfig(
        peak_tflops=_short(flops / 1e12), memory_bandwidth_gb_s=_short(bandwidth / 1e9),
        memory_gib=_short(memory / 2**30), devices_per_node=cores if kind == "cpu" else 8,
    )  # fmt: skip


def _fastest(call: Any, device: torch.device, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _efficiencies(paces: dict[str, Pace]) -> dict[str, float]:
    names = {item.name for item in dataclasses.fields(EfficiencyConfig)}
    every = {f"{kind}_{name}": value for kind, pace in paces.items() for name, value in vars(pace).items()}
    return {name: value for name, value in every.items() if name in names}


def _two_ranks() -> dict[str, float]:
    """Latency, bandwidth and mutual slowdown of two ranks of this machine; those of one where it has one core."""
    if (os.cpu_count() or 1) < 2:
        return {"latency_us": 0.0, "bandwidth_gb_s": 1.0, "slowdown": 1.0}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "megatron_sip.train.plan.pair"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=trial_environment())
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        raise ConfigurationError(f"two ranks did not run beside each other: {(done.stdout + done.stderr)[-1000:]}")
    ranks: dict[str, float] = json.loads(found[-1])
    return ranks


def _trial_figures(device: DeviceConfig, optimizer: Pace) -> dict[str, float]:
    """What a whole training takes besides its passes, and the embedded judge's time."""
    with tempfile.TemporaryDirectory() as name:
        recipe = write_trial(Path(name), _VOCABULARY, (60, 120), _TRIAL)
        found = run_trial(recipe, 1)
    tokens = _JUDGED_TOKENS
    moved = costs.Work(moved_bytes=8.0 * 150_000)
    explained = sum(seconds_by_cause(moved, device, optimizer).values())
    fixed_ms = 2.0
    return {
        "step_ms": max(0.0, found["timing/other_s"] - explained) * 1e3,
        "embedded_judge_ms": fixed_ms,
        "embedded_judge_us": max(0.0, found.get("judge/duration_s", 0.0) - fixed_ms * 1e-3) / tokens * 1e6,
    }


def _quality(samples: Sequence[Sample], device: DeviceConfig, pace: Pace) -> str:
    ratios = sorted(predicted(sample, device, pace) / sample.seconds for sample in samples)
    spread = math.exp(statistics.mean(abs(math.log(ratio)) for ratio in ratios)) - 1
    return (
        f"planned / measured {ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} runs, {spread:.0%} off on average"
    )


def _sources(measured: Measured, device: DeviceConfig, paces: dict[str, Pace]) -> dict[str, str]:
    sources = {}
    for kind, samples in measured.samples.items():
        text = f"measured: fit of short runs, {_quality(samples, device, paces[kind])}"
        sources.update({name: text for name in _efficiencies({kind: paces[kind]})})
    sources["busy_slowdown"] = "measured: a training pass on two ranks at once and on one alone"
    sources["step_ms"] = "measured: timing/other_s of a short training of a very small model"
    sources["embedded_judge_ms"] = "assumed: the way to the judge's process and back"
    sources["embedded_judge_us"] = "measured: judge/duration_s of the same training"
    return sources


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"core of {model}"


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
