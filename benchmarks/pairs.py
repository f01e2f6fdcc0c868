"""Times two sides in turn, each in a process of its own, and says by how much the one is faster.

Wall time, or (``--clock cpu``) the CPU time of the side's process: with one thread both are the same on an idle
machine, and CPU time stays nearly what it is on a busy one. The sides take turns step by step, so that what else the
machine does meets both; each pair gives one ratio, and the median of the ratios is the result. A side is a function of
a payload that returns a step: a function without arguments that does the work once and returns something to compare.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Step = Callable[[], Any]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Comparison:
    """Times in seconds of the same work by two sides, pair by pair."""

    name: str
    ours: str
    theirs: str
    ours_s: list[float]
    theirs_s: list[float]
    ours_value: Any
    theirs_value: Any
    tokens: int = 0
    """Tokens of one step, 0 if it has none to count."""

    @property
    def ratio(self) -> float:
        """How many times as fast our side is: median over the pairs."""
        return statistics.median(b / a for a, b in zip(self.ours_s, self.theirs_s, strict=True))

    def row(self) -> dict[str, Any]:
        """For the table and for JSON."""
        ratios = sorted(b / a for a, b in zip(self.ours_s, self.theirs_s, strict=True))
        found: dict[str, Any] = {
            "name": self.name,
            "ours": self.ours,
            "theirs": self.theirs,
            "ours_s": statistics.median(self.ours_s),
            "theirs_s": statistics.median(self.theirs_s),
            "ratio": self.ratio,
            "ratios": [ratios[0], ratios[-1]],
            "pairs": len(ratios),
            "ours_value": self.ours_value,
            "theirs_value": self.theirs_value,
        }
        if self.tokens:
            found["ours_tokens_per_s"] = self.tokens / found["ours_s"]
            found["theirs_tokens_per_s"] = self.tokens / found["theirs_s"]
        return found

    def with_values(self, ours: Any, theirs: Any) -> Comparison:
        """With other values to show, such as what the comparison of the first ones came to."""
        return replace(self, ours_value=ours, theirs_value=theirs)

    def line(self) -> str:
        """One line of the table."""
        row = self.row()
        speed = f" {row['ours_tokens_per_s']:9.0f} tokens/s" if self.tokens else ""
        return (
            f"{self.name:34} ours {row['ours_s']:8.3f} s{speed}   {self.theirs} {row['theirs_s']:8.3f} s   "
            f"{row['ratio']:5.2f}x ({row['ratios'][0]:.2f} to {row['ratios'][1]:.2f}, {row['pairs']} pairs)   "
            f"values {self.ours_value} {self.theirs_value}"
        )


class Side:
    """A process that builds ``target`` (``"module:function"``) and runs its step when told to.

    ``python``: its interpreter, by default this one. Another environment's needs what the target imports, not this
    package's requirements; modules are found from the repository's root.
    """

    def __init__(self, target: str, payload: dict[str, Any], clock: str, python: str = sys.executable) -> None:
        self._target = target
        self._pipe, other = multiprocessing.Pipe()
        command = [python, str(Path(__file__).resolve()), str(other.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()])
        other.close()
        self._pipe.send((target, payload, clock))
        self._receive()

    def step(self) -> tuple[float, Any]:
        """Seconds that the step took, and what it returned."""
        self._pipe.send("step")
        took_s, value = self._receive()
        return took_s, value

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send("end")
        self._process.wait()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the side {self._target} ended, see its output (exit {self._process.wait()})") from None


def _serve(pipe: Connection) -> None:
    """In the side's process; ends by itself if the benchmark does."""
    target, payload, clock = pipe.recv()
    now = CLOCKS[clock]
    module, function = target.split(":")
    step: Step = getattr(importlib.import_module(module), function)(payload)
    try:
        pipe.send("ready")
        while pipe.recv() == "step":
            started = now()
            value = step()
            pipe.send((now() - started, value))
    except (EOFError, BrokenPipeError):
        return


def compare(
    name: str,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    payload: dict[str, Any],
    num_pairs: int,
    num_warm_up: int = 1,
    tokens: int = 0,
    clock: str = "wall",
) -> Comparison:
    """Both sides are (label, target). The value kept is the one of each side's first step."""
    sides = Side(ours[1], payload, clock), Side(theirs[1], payload, clock)
    first = [side.step() for side in sides]
    for _ in range(num_warm_up - 1):
        for side in sides:
            side.step()
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(num_pairs):
        for index in (0, 1) if pair % 2 == 0 else (1, 0):
            times[index].append(sides[index].step()[0])
    for side in sides:
        side.close()
    return Comparison(name, ours[0], theirs[0], times[0], times[1], first[0][1], first[1][1], tokens)


def machine() -> dict[str, Any]:
    """Where and on what a benchmark ran."""
    from megatron_sip.observability.run_info import package_versions

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {
        "date": date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": package_versions(),
    }


def report(path: str | None, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Writes a JSON file, if one is wanted."""
    if path is None:
        return
    content = {"machine": machine(), "settings": settings, "results": rows}
    temporary = Path(path + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    # In place of this folder, whose files would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    _serve(Connection(int(sys.argv[1])))
