"""A worker that is killed ends the run with one line, at any moment: even in the middle of its answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sip.data.workers import WorkerLost, WorkerPool
from megatron_sip.errors import DataError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def act(task: object) -> object:
    """Does what a task says."""
    if task == "fail":
        raise DataError("in.jsonl:3: broken")
    if isinstance(task, signal.Signals):
        os.kill(os.getpid(), task)
    return task


def start() -> Callable[[object], object]:
    return act


def start_badly(how: str) -> Callable[[object], object]:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise DataError("no such model")


def test_answers_come_in_the_order_of_the_tasks_and_a_failed_task_ends_no_worker() -> None:
    pool: WorkerPool[object, object]
    with WorkerPool(2, start) as pool:
        assert list(pool.map(range(30))) == list(range(30))
        with pytest.raises(DataError, match=r"^in\.jsonl:3: broken(\n|$)"):
            list(pool.map(["fail"]))
        assert list(pool.map([b"x" * 5_000_000, "y"])) == [b"x" * 5_000_000, "y"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_at_its_task_is_named_with_its_signal_and_so_is_every_later_task(
    how: signal.Signals,
) -> None:
    pool: WorkerPool[object, object]
    with WorkerPool(1, start) as pool:
        futures = [pool.submit(task) for task in (1, how, 2, 3)]
        assert futures[0].result() == 1
        for future in futures[1:]:
            lost = future.exception(timeout=20)
            assert isinstance(lost, WorkerLost)
            assert re.match(rf"worker 1 of 1 \(process \d+\) was killed by {how.name}", str(lost))


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(DataError, match=r"^no such model(\n|$)"):
        WorkerPool(2, start_badly, "raise")
    with pytest.raises(WorkerLost, match="was killed by SIGKILL, as when memory runs out"):
        WorkerPool(2, start_badly, "kill")


def start_tool(folder: Path, num_files: int, *flags: object) -> subprocess.Popen[str]:
    """The tool in its own process, with answers of half a megabyte, more than a pipe takes at once."""
    row = json.dumps({"text": " ".join(map(str, range(900)))}) + "\n"
    (folder / "in").mkdir(exist_ok=True)
    for number in range(num_files):
        (folder / f"in/{number}.jsonl").write_text(row * (20_000 // num_files))
    command = [sys.executable, TOOL, "--input", folder / "in", "--tokenizer-type", "NullTokenizer"]
    command += ["--vocab-size", 999, "--workers", 2, *flags]
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )


def children(pid: int) -> list[int]:
    """Worker processes of the tool, the first one started first."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def cpu_ticks(pid: int) -> int:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_running(group: int) -> bool:
    """Whether any process of a group is there: multiprocessing's tracker ends a moment after its parent."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def expect_the_line(tool: subprocess.Popen[str], killed: int, outcome: str) -> None:
    """One line that names worker, signal and remedy, within seconds; and nobody left behind."""
    try:
        _, message = tool.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        os.killpg(tool.pid, signal.SIGKILL)
        tool.communicate()
        raise
    assert tool.returncode == 1
    assert message.startswith("preprocess_data: worker ") and message.count("\n") == 1, message
    assert f"of 2 (process {killed}) was killed by SIGKILL" in message and outcome in message
    assert "fewer than --workers 2 if memory is short" in message
    wait_until(lambda: not is_running(tool.pid), "processes were left behind")


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")
@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_killed_in_the_middle_of_its_answer_ends_a_run_to_one_corpus(tmp_path: Path, number: int) -> None:
    tool = start_tool(tmp_path, 1, "--output-prefix", tmp_path / "out")
    partial = tmp_path / "out_text_document.bin.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0, "no answer has come")
    workers = children(tool.pid)
    assert len(workers) == 2
    # A parent that stands still reads no answer: its workers come to stand in the middle of theirs.
    tool.send_signal(signal.SIGSTOP)
    before: list[int] = []
    while before != (now := [cpu_ticks(pid) for pid in workers]):
        before = now
        time.sleep(0.5)
    os.kill(workers[number], signal.SIGKILL)
    time.sleep(0.1)
    tool.send_signal(signal.SIGCONT)
    expect_the_line(tool, workers[number], "nothing was written: run again")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")
def test_a_worker_killed_at_its_shard_ends_the_run_and_the_command_repeated_goes_on(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    tool = start_tool(tmp_path, 6, "--output-dir", shards)
    wait_until(lambda: any(shards.glob("*.done.json")) and any(shards.glob("*.bin.partial")), "no shard was done")
    killed = children(tool.pid)[1]
    os.kill(killed, signal.SIGKILL)
    expect_the_line(tool, killed, "finished shards are kept: repeat the command")
    assert list(shards.glob("*.partial")) == []
    num_done = len(list(shards.glob("*.done.json")))
    assert 1 <= num_done < 6 and not (shards / "manifest.json").exists()
    again = start_tool(tmp_path, 6, "--output-dir", shards)
    _, message = again.communicate(timeout=60)
    assert again.returncode == 0, message
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["counts"]["num_tokens"] == {"text": 6 * (20_000 // 6) * 900}
