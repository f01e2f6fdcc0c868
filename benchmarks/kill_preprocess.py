#!/usr/bin/env python
"""Kills tools/preprocess_data.py with SIGKILL at random moments, resumes it, and compares with an undisturbed run.

Everything in the output folder that counts is compared by SHA-256: .bin, .idx, .meta.json, notes and the manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def write_inputs(folder: Path, num_files: int, num_lines: int) -> None:
    """Files of numbers for the NullTokenizer."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_files):
        rows = rng.integers(0, 999, (num_lines, 200))
        lines = (json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in rows)
        (folder / f"part{number}.jsonl").write_text("".join(lines))


def start(inputs: Path, output: Path, node: tuple[int, int]) -> subprocess.Popen[bytes]:
    """One node's run of the tool, with two workers."""
    flags = ["--input", inputs, "--output-dir", output, "--tokenizer-type", "NullTokenizer", "--vocab-size", "999"]
    flags += ["--append-eod", "--workers", "2", "--shard-index", node[0], "--num-shards", node[1]]
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def size(folder: Path) -> int:
    """Bytes of tokens, those of unfinished shards too."""
    total = 0
    for path in folder.glob("*.bin*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # it got its final name in this moment
    return total


def digests(folder: Path) -> dict[str, str]:
    """Of every file that counts: a kill may leave *.partial and *.lock."""
    files = [path for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=2, help="kills go to a random one of so many shares of the files")
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    nodes = [(index, options.nodes) for index in range(options.nodes)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_inputs(root / "in", options.files, options.lines)
        if start(root / "in", root / "undisturbed", (0, 1)).wait():
            sys.exit("the undisturbed run failed")
        expected, total = digests(root / "undisturbed"), size(root / "undisturbed")
        moments = []
        # A moment is an amount of work done, not a time: a busy machine would make all of those too early.
        for share in np.sort(rng.uniform(0, 0.95, options.kills)):
            tool = start(root / "in", root / "out", nodes[int(rng.integers(options.nodes))])
            while tool.poll() is None and size(root / "out") <= share * total:
                time.sleep(0.001)
            moments.append((tool.poll() is None, size(root / "out") / total))
            tool.send_signal(signal.SIGKILL)
            tool.wait()
        for node in nodes:
            if start(root / "in", root / "out", node).wait():
                sys.exit(f"node {node[0]} failed to go on")
        same = digests(root / "out") == expected
        parts = ", ".join(f"{100 * part:.0f} %{'' if running else ' (had ended)'}" for running, part in moments)
        print(f"{sum(running for running, _ in moments)} runs killed on {options.nodes} nodes at {parts} of the tokens")
        print(f"{len(expected)} files: {'byte-identical' if same else 'DIFFERENT'}")
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
