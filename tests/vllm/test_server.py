"""The server of these tests itself: it does not outlive them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# As a server that is starting: deaf to SIGTERM, with a process of its own.
DEAF = "trap '' TERM; sleep 600 & echo $! $$ > {file}; wait"
STARTS_ONE = """
import sys
from pathlib import Path
from tests.vllm import server
server._wait_until_ready = lambda *_: print("ready", flush=True)
served = server.VllmServer("http://127.0.0.1:1", Path(), Path({log!r}))
with server._running(["bash", "-c", {command!r}], {{}}, served):
    sys.stdin.read()
"""


def test_a_server_ends_with_the_process_that_started_it_however_that_ends(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers"
    code = STARTS_ONE.format(log=str(tmp_path / "log"), command=DEAF.format(file=numbers))
    starter = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert starter.stdout is not None and starter.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 60
    while not (numbers.exists() and numbers.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = [int(number) for number in numbers.read_text().split()]
    assert all(alive(number) for number in started)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    while any(alive(number) for number in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(number) for number in started)


def alive(number: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        os.kill(number, 0)
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
