"""Whole short trainings on random text: what a planner is calibrated and checked by."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.errors import SIPError
from megatron_sip.teacher.ngram import fit_ngrams
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer

ENTRY = Path(__file__).resolve().parents[3] / "pretrain_sip.py"
SKIPPED_STEPS = 2
"""First steps: memory is allocated, kernels are chosen."""


def write_trial(folder: Path, vocab_size: int, document_tokens: tuple[int, int], options: Mapping[str, Any]) -> Path:
    """A corpus of random documents with so many tokens (from, to), its judge, and the recipe with ``options``."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size - 1))
    random = np.random.default_rng(7)
    documents = [
        np.append(random.integers(0, vocab_size - 1, random.integers(*document_tokens)), tokenizer.eod_id)
        for _ in range(200)
    ]
    with IndexedWriter(str(folder / "corpus"), tokenizer.vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        writer.close(
            CorpusMeta(
                tokenizer_fingerprint=tokenizer.fingerprint,
                tokenizer_type="NullTokenizer",
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                append_eod=True,
                num_documents=writer.num_documents,
                num_tokens=writer.num_tokens,
            )
        )
    lengths = np.array([len(document) for document in documents])
    judge = fit_ngrams(np.concatenate(documents), lengths, tokenizer.vocab_size, 3, tokenizer.fingerprint)
    judge.save(folder / "judge.npz")
    recipe = {
        "preset": "tiny", "lr": 1e-5, "lr_decay_style": "constant", "eval_interval": 0, "log_interval": 10**6,
        "data_path": [str(folder / "corpus")], "tokenizer_type": "NullTokenizer", "vocab_size": vocab_size - 1,
        "judge_model": str(folder / "judge.npz"), "run_dir": str(folder / "run"), "save": None, "load": None,
        "log_samples": 0, "max_position_embeddings": 4096, **options,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def trial_environment() -> dict[str, str]:
    """This process's environment without what it was itself told, or has set, of a job."""
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    kept = {name: v for name, v in os.environ.items() if name not in job and not name.startswith("TORCHELASTIC_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ENTRY.parent)}


def run_trial(recipe: Path, num_ranks: int) -> dict[str, float]:
    """Trains by the entry point, one thread per rank; medians of each scalar over the steps that count.

    Raises:
        SIPError: the training failed; the message ends with its last words.
    """
    command = [sys.executable]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += [str(ENTRY), "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=trial_environment())
    if done.returncode:
        raise SIPError(f"the trial {recipe} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    lines = (recipe.parent / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][SKIPPED_STEPS:]
    names = {name for record in records for name, value in record.items() if isinstance(value, int | float)}
    return {name: statistics.median(record.get(name, 0.0) for record in records) for name in sorted(names)}
