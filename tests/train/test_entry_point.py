"""``pretrain_sip.py`` as a user meets it: under torchrun, with signals, lost ranks, faults and their one line.

Does not cover several nodes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.train.runs import recipe, write_corpora

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


def write_recipe(corpora: Path, path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(recipe(corpora, **changes)))
    return path


class Torchrun:
    """Two ranks of ``pretrain_sip.py`` and whatever processes they start."""

    def __init__(self, config: Path, log: Path, *flags: str) -> None:
        self.log = log
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "pretrain_sip.py"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*launch, "--config", str(config), *flags], cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output
            )
        self.family: list[psutil.Process] = []

    def wait_for_step(self, step: int, run_dir: Path) -> None:
        deadline = time.monotonic() + 200
        while steps(run_dir)[-1:] < [step]:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def rank(self, number: int) -> psutil.Process:
        return next(p for p in self.family if p.environ().get("RANK") == str(number) and "-m" not in p.cmdline())

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=5)
        assert not [process.cmdline() for process in alive]

    def end(self) -> None:
        family = [*self.family]
        if self.process.poll() is None:
            family += psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def started() -> Iterator[list[Torchrun]]:
    runs: list[Torchrun] = []
    yield runs
    for run in runs:
        run.end()


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_run_ended_by_sigterm_saves_and_goes_on_and_one_that_loses_a_rank_says_so_once(
    corpora: Path, tmp_path: Path, started: list[Torchrun]
) -> None:
    run_dir, save = tmp_path / "run", tmp_path / "checkpoints"
    config = write_recipe(corpora, tmp_path / "run.yaml", train_iters=500, run_dir=str(run_dir), save=str(save))
    started.append(Torchrun(config, tmp_path / "first.log"))
    started[0].wait_for_step(2, run_dir)
    started[0].process.send_signal(signal.SIGTERM)
    started[0].process.wait(120)
    log = (tmp_path / "first.log").read_text()
    ours = log.partition("Traceback")[0]  # torchrun's own, which says that it had a signal
    assert "received SIGTERM" in ours and "torchrun" not in ours.partition("the run ends")[0]
    # Nothing of what the libraries warn about reaches a user.
    assert "Warning" not in ours and "[WARNING]" not in ours, ours
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved == steps(run_dir)[-1]
    started[0].assert_nothing_is_left()

    started.append(Torchrun(config, tmp_path / "second.log", "--load", str(save)))
    started[1].wait_for_step(saved + 2, run_dir)
    assert steps(run_dir)[: saved + 2] == list(range(1, saved + 3))
    started[1].rank(1).kill()
    assert started[1].process.wait(120) == 1
    log = (tmp_path / "second.log").read_text()
    assert log.count("error: ") == 1 and "error: rank 0 has lost another rank" in log
    assert "megatron_sip/" not in log and "Warning" not in log  # no traceback of ours
    started[1].assert_nothing_is_left()


def catches(process: psutil.Process, number: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize("moment", ["imports", "the teacher has started"])
def test_sigterm_before_the_first_step_is_one_line_and_leaves_nothing_running(
    moment: str, corpora: Path, tmp_path: Path
) -> None:
    config = write_recipe(corpora, tmp_path / "run.yaml", train_iters=500, run_dir=str(tmp_path / "run"))
    command = [sys.executable, "pretrain_sip.py", "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        started = psutil.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 100
        while not (catches(started, signal.SIGTERM) if moment == "imports" else started.children()):
            assert started.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        family = started.children(recursive=True)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        if started.poll() is None:
            started.kill()
    said = "received SIGTERM while no step was running: nothing to save, leaving\n"
    assert (tmp_path / "log").read_text() == said
    assert not steps(tmp_path / "run")


def test_fault_that_all_ranks_meet_is_one_line_without_a_traceback(corpora: Path, tmp_path: Path) -> None:
    config = write_recipe(corpora, tmp_path / "run.yaml", global_batch_size=15)
    run = Torchrun(config, tmp_path / "log")
    assert run.process.wait(120) == 1  # torchrun's own; the ranks' is in its table
    log = (tmp_path / "log").read_text()
    assert log.count("error: --global-batch-size 15 is not divisible") == 1
    assert "exitcode  : 2" in log and "megatron_sip/" not in log


FAULT_OF_SOME = """
import os, sys, time
from megatron_sip.errors import ConfigurationError
from megatron_sip.train.failures import say_once_per_node
rank = os.environ["LOCAL_RANK"]
if rank == "0":
    time.sleep(3)
    if sys.argv[1] == "one":
        time.sleep(100)
say_once_per_node(ConfigurationError("no such file"), patience=0.5 if sys.argv[1] == "one" else 60)
sys.exit(2)
"""


@pytest.mark.parametrize(("who", "place"), [("all", ""), ("one", " (local rank 1)")])
def test_fault_before_the_ranks_know_each_other_is_said_once_though_the_speaker_is_the_last(
    who: str, place: str, tmp_path: Path
) -> None:
    # torchrun stops all ranks as soon as one has ended: the first one's line was lost if it was the slower.
    (tmp_path / "fault.py").write_text(FAULT_OF_SOME)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "fault.py"), who]
    done = subprocess.run(launch, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == ["error: no such file" + place]


FAULTS = """
import errno, os, sys
from megatron_sip.errors import JudgeError
from megatron_sip.train.failures import failures_end_the_job
for fault in (JudgeError("the judge is gone"), OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"),
              ZeroDivisionError("a defect"), KeyboardInterrupt()):
    if not os.fork():
        with failures_end_the_job():
            raise fault
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_fault_of_one_rank_ends_its_process_at_once_with_a_line_or_for_a_defect_a_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1", "1", "130"]
    lines = done.stderr.splitlines()
    assert lines[0] == "error: the judge is gone"
    assert lines[1].startswith("error: [Errno 28] No space left on device: 'run/metrics.jsonl': ")
    assert lines[2].startswith("Traceback") and lines[-2] == "ZeroDivisionError: a defect"
    assert lines[-1].startswith("interrupted twice")


TOOLS = sorted(path.name for path in (ROOT / "tools").glob("[a-z]*.py"))
WITHOUT_TORCH = """
import runpy, sys
script = sys.argv[1]
sys.argv[:2] = [script]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert end.code in (0, None), end.code
print(sorted({"torch", "megatron.core", "transformers"}.intersection(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("script", ["pretrain_sip.py", *(f"tools/{name}" for name in TOOLS)])
def test_help_prints_nothing_but_the_help_and_loads_neither_torch_nor_megatron(script: str) -> None:
    # Those imports take seconds, and on Python 3.12 torch's CUDA build says that there is no CUDA.
    command = [sys.executable, "-c", WITHOUT_TORCH, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "--help" in done.stdout
    assert done.stderr == "[]\n"
    assert "[None]" not in done.stdout and "==SUPPRESS==" not in done.stdout


def test_a_section_of_the_help_is_printed_alone() -> None:
    command = [sys.executable, "pretrain_sip.py", "--help", "training"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "--train-iters" in done.stdout and "--lr" not in done.stdout
    assert done.stderr == ""
