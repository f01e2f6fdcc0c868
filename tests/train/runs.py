"""Small whole training runs for tests: real corpora, model, teacher process and checkpoints; run on ranks."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.data.indexed import CorpusMeta, IndexedWriter, open_indexed
from megatron_sip.errors import RolloutError
from megatron_sip.teacher.ngram import fit_ngrams
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.types import Candidate, CandidateKind
from tests.limits import largest_file

VOCABULARY = 61
SUFFIX = 6


def write_corpora(folder: Path) -> None:
    """A policy and a validation corpus of NullTokenizer documents with something to learn: noisy arithmetic series."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1))
    random = np.random.default_rng(5)
    for name, num_documents in (("policy", 60), ("validation", 12)):
        prefix = str(folder / name)
        with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
            for _ in range(num_documents):
                start, stride, length = random.integers(0, 60), random.integers(1, 4), random.integers(20, 60)
                tokens = (start + stride * np.arange(length)) % (VOCABULARY - 1)
                writer.add_document(np.append(tokens, tokenizer.eod_id))
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
    fit_judge(folder)


def fit_judge(folder: Path) -> None:
    """An n-gram judge of the policy corpus; its overuse penalty has running statistics, which checkpoints carry."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1))
    corpus = open_indexed(str(folder / "policy"), tokenizer.vocab_size)
    lengths = np.asarray(corpus.document_lengths)
    tokens = corpus.tokens(0, int(lengths.sum()))
    fit_ngrams(tokens, lengths, tokenizer.vocab_size, 3, tokenizer.fingerprint).save(folder / "judge.npz")


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run that has every stream in each step; ``changes`` are flat keys."""
    return {
        "train_iters": 4,
        "micro_batch_size": 2,
        "rollout_micro_batch_size": 2,
        "global_batch_size": 16,
        "eval_interval": 0,
        "seed": 11,
        "preset": "tiny",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": 8,
        "lr": 5e-3,
        "lr_decay_style": "constant",
        "data_path": [str(folder / "policy")],
        "seq_length": 24,
        "suffix_length": SUFFIX,
        "min_prefix_length": 4,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": VOCABULARY - 1,
        "phases": [{"name": "all", "ntp": 0.5, "suffix": 0.25, "rollout": 0.25}],
        "candidates": "suffix,rollout:2",
        "judge_model": str(folder / "judge.npz"),
        "judge_factuality_weight": 1.0,
        "objective": "online_dpo",
        "dpo_nll_weight": 0.1,
        "reference_policy": "synced",
        "reference_sync_interval": 2,
        "run_dir": str(folder / "run"),
        "save": None,
        "load": None,
        **changes,
    }


class RecordedRollouts:
    """Stands in for sampling where layouts are compared: sampling turns rounding into other tokens. What it gives
    depends on the request alone, and is near the suffix often enough that verdicts differ."""

    def generate(self, requests: Any) -> list[list[Candidate]]:
        rows = []
        for request in requests:
            random = np.random.default_rng([request.seed_key.step, request.sample_id])
            series = (int(request.prefix[-1]) + np.arange(1, 1 + request.max_new_tokens)) % (VOCABULARY - 1)
            rows.append(
                [
                    Candidate(CandidateKind.ROLLOUT, np.where(random.random(len(series)) < share, series, 7), k)
                    for k, share in enumerate(np.linspace(0.2, 0.9, request.num_rollouts))
                ]
            )
        return rows

    def sync_weights(self, version: int) -> None:
        pass


class LostRollouts(RecordedRollouts):
    """Stands in for servers that go away for good while weights of a version are handed over, or after it."""

    def __init__(self, version: int, while_handed_over: bool) -> None:
        self._version = version
        self._while_handed_over = while_handed_over
        self._lost = False

    def generate(self, requests: Any) -> list[list[Candidate]]:
        if self._lost:
            raise RolloutError("the servers are gone")
        return super().generate(requests)

    def sync_weights(self, version: int) -> None:
        self._lost = version == self._version
        if self._lost and self._while_handed_over:
            raise RolloutError("the servers are gone")


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Runs a recipe on this rank; ``recorded`` puts recorded rollouts in. Returns step records and a weight digest."""
    from megatron_sip.checkpoint import StopSignals
    from megatron_sip.distributed import initialize
    from megatron_sip.train import build
    from megatron_sip.train.config import train_config_from

    config = train_config_from(payload["recipe"])
    context = initialize(config.parallel, config.training.seed)
    with StopSignals() as signals, build.build_trainer(config, context, signals) as trainer:
        if payload.get("recorded"):
            trainer._queue._preparer.rollouts = RecordedRollouts()
        trainer.load()
        with largest_file(payload["largest_file"]) if payload.get("largest_file") else nullcontext():
            end = trainer.run()
        norm = trainer._engine.parameter_norm()
        weights = {
            name: parameter.detach().float().numpy().copy()
            for chunk in trainer._engine.chunks
            for name, parameter in chunk.named_parameters()
        }
        has_reference = trainer._engine.has_reference
    found = {"end": end, "norm": norm, "weights": weights, "records": records(config)}
    return {**found, "has_reference": has_reference}


def records(config: Any) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    path = Path(config.observability.run_dir) / "metrics.jsonl"
    if int(os.environ.get("RANK", "0")) or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
