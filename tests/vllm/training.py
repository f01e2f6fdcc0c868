"""A policy in training, a server of it by the printed line, and runs of ``pretrain_sip.py`` that ask that server."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.train.runs import recipe, write_corpora
from tests.vllm.server import VllmServer, end_with_parent, free_port, printed_server
from tools.export_policy import main as export

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "lr": 1e-3}
"""vLLM on CPU has no heads narrower than 32."""


@dataclass(frozen=True)
class Home:
    """Corpora, and a checkpoint of one step with what was exported of it."""

    folder: Path
    python: str
    """Of vLLM's environment."""

    @contextmanager
    def server(self, port: int, log: Path) -> Iterator[VllmServer]:
        """By the line that tools/export_policy.py prints."""
        printed, policy = io.StringIO(), log.parent / f"policy-{log.stem}"
        flags = ["--for-rollouts", "--cpu", "--weight-transfer", "gloo", "--port", str(port)]
        with redirect_stdout(printed):
            assert export([str(self.folder / "start"), str(policy), *flags]) == 0
        with printed_server(printed.getvalue(), self.python, policy, port, log) as server:
            yield server

    def run(self, folder: Path, urls: Sequence[str], **changes: Any) -> Run:
        """Starts to train from the exported weights, with rollouts from ``urls``."""
        start = {"pretrained_checkpoint": str(self.folder / "start")} if urls else {}
        values = recipe(self.folder, **SIZES, run_dir=str(folder / "run"), **start)
        if urls:
            values |= {"rollout_engine": "vllm", "rollout_endpoints": list(urls)}
        return Run(values | changes, folder)


class Run:
    """One rank of ``pretrain_sip.py``."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._log, config = folder / "log", folder / "run.yaml"
        self._metrics = Path(values["run_dir"]) / "metrics.jsonl"
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "pretrain_sip.py", "--config", config],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                preexec_fn=end_with_parent,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def end(self, timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """Waits for a good end; the steps' metrics."""
        assert self.process.wait(timeout_s) == 0, self.log
        return self.steps()

    def wait_for_steps(self, number: int, timeout_s: float = 150.0) -> None:
        """Until so many are done; the run must not be over by then."""
        deadline = time.monotonic() + timeout_s
        while len(self.steps()) < number and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.05)
        assert len(self.steps()) >= number and self.process.poll() is None, self.log

    def steps(self) -> list[dict[str, Any]]:
        """So far."""
        if not self._metrics.exists():
            return []
        return [json.loads(line) for line in self._metrics.read_text(encoding="utf-8").splitlines() if line]


@contextmanager
def home(folder: Path, python: str) -> Iterator[Home]:
    """With one step made by in-process rollouts."""
    write_corpora(folder)
    found = Home(folder, python)
    found.run(folder / "before", (), train_iters=1, save=str(folder / "start")).end()
    yield found


__all__ = ["Home", "Run", "free_port", "home"]
