#!/usr/bin/env python
"""Memory of tools/preprocess_data.py: the most that all its processes held together, sampled every 50 ms.

Counts each process's own pages and a share of those that several hold (PSS). ``--command`` and what follows is run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil


def held_bytes(process: psutil.Process) -> int:
    """PSS of a process and all below it."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            for line in Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, PermissionError):
        return total  # one of them has ended
    return total


def main() -> None:
    """Run a command and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", nargs=argparse.REMAINDER, required=True)
    options = parser.parse_args()
    started, most = time.monotonic(), 0
    command = subprocess.Popen(options.command)
    process = psutil.Process(command.pid)
    while command.poll() is None:
        most = max(most, held_bytes(process))
        time.sleep(0.05)
    print(f"{most / 1e9:.3f} GB at most, {time.monotonic() - started:.1f} s")
    sys.exit(command.returncode)


if __name__ == "__main__":
    main()
