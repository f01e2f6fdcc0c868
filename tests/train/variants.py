"""What the rank of test_variants.py runs: one recipe after another, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.train.runs import VOCABULARY, records


def fit_judge(corpus: Path, path: Path) -> None:
    """The embedded quality judge's n-gram model, of a corpus of ``runs.write_corpora``."""
    from megatron_sip.data.indexed import open_indexed
    from megatron_sip.teacher.ngram import fit_ngrams

    documents = open_indexed(str(corpus), VOCABULARY)
    tokens = documents.tokens(0, documents.num_tokens)
    fit_ngrams(tokens, np.asarray(documents.document_lengths), VOCABULARY, order=3).save(path)


def train_all(payload: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Records of the steps of every recipe, by its name."""
    from megatron_sip.checkpoint import StopSignals
    from megatron_sip.distributed import initialize
    from megatron_sip.train import build
    from megatron_sip.train.config import train_config_from

    configs = {name: train_config_from(recipe, name) for name, recipe in payload["recipes"].items()}
    first = next(iter(configs.values()))
    context = initialize(first.parallel, first.training.seed)
    fit_judge(Path(payload["judge_corpus"]), Path(payload["judge_model"]))
    found = {}
    for name, config in configs.items():
        with StopSignals() as signals, build.build_trainer(config, context, signals) as trainer:
            trainer.load()
            trainer.run()
        found[name] = records(config)
    return found
