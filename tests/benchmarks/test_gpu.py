"""benchmarks/gpu.py: its formulas by hand, and the whole program on a CPU; no figure of a GPU is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.flops import RowWork, decode_bytes, forward_flops, peak_of
from megatron_sip.model import PRESETS, Architecture, training_flops_per_token

ROOT = Path(__file__).resolve().parents[2]
SMALL = Architecture(
    num_layers=1, hidden_size=4, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=8, kv_channels=2,
    max_position_embeddings=16,
)  # fmt: skip
"""Weights of the layer: query 16, key and value 16, projection 16, MLP 96, norms 8; final norm 4: 156. Of the output
layer at a vocabulary of 10: 40."""


def test_a_shared_row_counts_its_prefix_once_and_the_output_layer_on_candidates_alone() -> None:
    row = RowWork(prefix=3, num_candidates=2, candidate=2)
    assert (row.tokens, row.scored) == (7, 4)
    assert row.attended == 3 * 3 / 2 + 2 * (2 * 3 + 2 * 2 / 2) == 20.5
    assert forward_flops(SMALL, 10, row) == 2 * 156 * 7 + 2 * 40 * 4 + 4 * 2 * 2 * 20.5


def test_a_next_token_row_needs_what_the_presets_formula_says() -> None:
    for architecture in PRESETS.values():
        per_row = 3 * forward_flops(architecture, 32000, RowWork(2048))
        assert per_row == pytest.approx(2048 * training_flops_per_token(architecture, 32000, 2048), rel=1e-12)


def test_a_decode_step_reads_weights_prefixes_and_what_rollouts_have_of_their_own() -> None:
    # Per token 2 * 1 group * 2 = 4 entries; 3 + 5 tokens of prefixes, 4 rollouts of 1.5 each on average.
    assert decode_bytes(SMALL, 10, [3, 5], rollouts=2, new_tokens=1.5) == 2 * (156 + 40 + 4 * (8 + 6))


def test_devices_are_told_apart_by_name() -> None:
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB")
    speeds = [getattr(peak_of(name), "bytes_per_s", None) for name in names]
    assert speeds == [4.8e12, 3.35e12, 2.0e12, 2.039e12]
    assert peak_of("NVIDIA GeForce GTX 1080") is None


def _run(device: str, path: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "benchmarks/gpu.py", "--device", device, "--size", "tiny", "--steps", "1"]
    command += ["--peak-tflops", "0.5", "--peak-gb-s", "20", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    assert [row["part"] for row in rows] == ["ntp", "dpo", "prefill", "decode", "memory", "memory", "memory"]
    return rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_whole_program_runs_on_a_gpu_and_blocks_take_less_memory_than_logits(tmp_path: Path) -> None:
    used = {row["way"]: row["used_bytes"] for row in _run("cuda", tmp_path / "gpu.json")[4:]}
    assert 0 < used["blocks"] < used["full"] and 0 < used["linear"] < used["full"]


def test_the_whole_program_runs_on_a_cpu(tmp_path: Path) -> None:
    rows = _run("cpu", tmp_path / "gpu.json")
    for row in rows[:2]:
        assert row["mfu"] == pytest.approx(row["model_tflops"] / row["step_s"] / 0.5)
    assert rows[0]["model_tflops"] * 1e12 == pytest.approx(4 * 64 * training_flops_per_token(PRESETS["tiny"], 512, 64))
    assert rows[3]["bandwidth"] == pytest.approx(rows[3]["gigabytes_per_step"] / rows[3]["step_s"] / 20)
    log_probs = {row["way"]: row["log_prob"] for row in rows[4:]}
    # Logits in bfloat16 on all three ways; about log(4096) = 8.3.
    assert max(log_probs.values()) - min(log_probs.values()) < 1e-3


def test_a_missing_gpu_is_said_with_the_way_out() -> None:
    command = [sys.executable, "benchmarks/gpu.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "--device cpu --size tiny" in done.stderr
