"""What the ranks of test_lookahead.py run: several small runs, one after another, in one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sip.errors import RolloutError
from tests.train.runs import LostRollouts, RecordedRollouts, records


def train_all(payload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Runs the recipes of ``payload["runs"]`` in order; see ``_train`` for what comes back of each."""
    from megatron_sip.distributed import initialize
    from megatron_sip.train.config import train_config_from

    configs = {name: train_config_from(run["recipe"], name) for name, run in payload["runs"].items()}
    first = next(iter(configs.values()))
    context = initialize(first.parallel, first.training.seed)
    return {name: _train(configs[name], context, run) for name, run in payload["runs"].items()}


def _train(config: Any, context: Any, run: dict[str, Any]) -> dict[str, Any]:
    """``run``: ``recorded`` rollouts, or ``lost`` ones (``LostRollouts``); ``stop_on``: words of a message upon which
    rank 0, and no other, gets SIGTERM."""
    from megatron_sip.checkpoint import StopSignals
    from megatron_sip.train import build

    started = time.perf_counter()
    with (
        _listening(run.get("stop_on")) as said,
        StopSignals() as signals,
        build.build_trainer(config, context, signals) as trainer,
    ):
        if run.get("recorded"):
            trainer._queue._preparer.rollouts = RecordedRollouts()
        if "lost" in run:
            trainer._queue._preparer.rollouts = trainer._runner._rollouts = LostRollouts(*run["lost"])
        trainer.load()
        pending = [(step.step, step.judged is not None) for step in trainer._queue._queue]
        end: Any = None
        try:
            end = trainer.run()
        except RolloutError as error:
            said.append(str(error))
        weights = {
            name: parameter.detach().float().numpy().copy()
            for chunk in trainer._engine.chunks
            for name, parameter in chunk.named_parameters()
        }
    return {
        "end": end,
        "pending": pending,
        "consumed": trainer._loader.consumed,
        "weights": weights,
        "records": records(config),
        "said": said,
        "seconds": time.perf_counter() - started,
        "saved": sorted(p.name for p in Path(config.checkpoint.save or os.devnull).glob("iter_*")),
    }


@contextmanager
def _listening(stop_on: str | None) -> Iterator[list[str]]:
    """The messages of a run."""
    from megatron_sip.train.record import RunRecord

    said: list[str] = []

    def message(record: RunRecord, text: str) -> None:
        said.append(text)
        if stop_on is not None and stop_on in text and os.environ["RANK"] == "0":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before, RunRecord.message = RunRecord.message, message
    try:
        yield said
    finally:
        RunRecord.message = before
