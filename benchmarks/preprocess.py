#!/usr/bin/env python
"""tools/preprocess_data.py beside Megatron-LM's approach, its own tool and datatrove: same text, tokenizer and workers.

Contenders are programs of their own, timed in turn on two inputs, the second ``--copies`` times the first: the
difference is their speed without the start of Python and of workers. ``bare`` is the tokenizer's own call and nothing
else, in as many processes. Rounds are appended to ``--results`` (JSON lines), so that many short runs make one table:
``--summary`` prints medians. ``--work N`` measures everything but the tokenizer's own call: CPU time of one process
that does all of a contender's work, its pickles too, with a tokenizer that knows the answers; N repeats after a first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ROOT / "benchmarks" / "preprocess_contenders.py"


def megatron_flags(tokenizer: dict[str, object]) -> list[str]:
    """A tokenizer as the flags of both preprocess_data.py."""
    flags = []
    for name, value in tokenizer.items():
        if name != "tokenizer_engine":
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def commands(options: argparse.Namespace, folder: Path, copies: int) -> dict[str, list[str]]:
    """Contender -> its command on the input of so many copies."""
    tokenizer = json.loads(options.tokenizer)
    one, output = str(folder / f"{copies}.jsonl"), str(folder / "out")
    python, workers = sys.executable, ["--workers", str(options.workers)]
    own = [python, str(CONTENDERS)]
    tail = ["--tokenizer", options.tokenizer, *workers]
    flags = [*megatron_flags(tokenizer), "--append-eod", *workers]
    tool = [python, str(ROOT / "tools" / "preprocess_data.py")]
    found = {
        "bare": [*own, "bare", "--input", str(folder / "1.jsonl"), "--passes", str(copies), *tail],
        "approach": [*own, "approach", "--input", one, "--output", output, *tail],
        "ours, one corpus": [*tool, "--input", one, "--output-prefix", output, *flags],
        "ours, shards": [*tool, "--input", str(folder / f"parts{copies}"), "--output-dir", f"{output}.shards", *flags],
    }
    if options.fast:
        engine = ["--tokenizer-engine", "gigatoken"]
        fast = json.dumps({**tokenizer, "tokenizer_engine": "gigatoken"})
        found["bare, gigatoken"] = [*found["bare"][:-4], "--tokenizer", fast, *workers]
        found["ours, one corpus, gigatoken"] = [*found["ours, one corpus"], *engine]
        found["ours, shards, gigatoken"] = [*found["ours, shards"], *engine]
    if options.megatron_lm is not None:
        theirs = [python, str(options.megatron_lm / "tools" / "preprocess_data.py"), "--input", one]
        found["Megatron-LM"] = [*theirs, "--output-prefix", output, *flags]
    if options.datatrove:
        parts = str(folder / f"parts{copies}")
        found["datatrove"] = [*own, "datatrove", "--input", parts, "--output", f"{output}.trove", *tail]
    return {name: found[name] for name in found if not options.only or name in options.only}


def run(name: str, command: list[str], megatron_lm: Path | None) -> tuple[float, float]:
    """(wall, CPU) seconds of a command with all its children; of ``bare`` what it measured itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    if name == "Megatron-LM":
        environment["PYTHONPATH"] = str(megatron_lm)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall_s, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    if name.startswith("bare"):
        found = json.loads(done.stdout)
        return found["wall_s"], found["cpu_s"]
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_round(options: argparse.Namespace, folder: Path) -> None:
    """Time every contender once on both inputs; check that all that write Megatron's files write the same."""
    mb = (folder / "1.jsonl").stat().st_size / 1e6
    outputs = {}
    for name in commands(options, folder, 1):
        seconds = []
        for copies in (1, options.copies):
            for path in folder.glob("out*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            seconds.append(run(name, commands(options, folder, copies)[name], options.megatron_lm))
        if (folder / "out_text_document.bin").is_file():
            files = [(folder / f"out_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")]
            outputs[name] = b"".join(files)
        if name.startswith("bare"):
            wall_s, cpu_s = (value / options.copies for value in seconds[1])
        else:
            wall_s, cpu_s = ((second - first) / (options.copies - 1) for first, second in zip(*seconds, strict=True))
        record = {"name": name, "wall_s_per_mb": wall_s / mb, "cpu_s_per_mb": cpu_s / mb, "start_s": seconds[0][0]}
        with open(options.results, "a") as stream:
            stream.write(json.dumps({"label": options.label, "workers": options.workers, **record}) + "\n")
        print(
            f"{name:32} {1 / record['wall_s_per_mb']:8.2f} MB/s {1000 * record['cpu_s_per_mb']:8.2f} CPU ms/MB",
            flush=True,
        )
    if len(set(outputs.values())) > 1:
        sys.exit(f"files differ: {', '.join(outputs)}")
    print(f"equal .bin and .idx: {', '.join(outputs)}", flush=True)


def summary(path: Path) -> None:
    """Medians of all rounds, with the least and the most."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        rows[record["label"], record["name"]].append(record)
    print("| tokenizer | contender | rounds | MB/s (least to most) | CPU ms/MB |\n|---|---|---|---|---|")
    for (label, name), found in rows.items():
        speeds = [1 / record["wall_s_per_mb"] for record in found]
        cpu = statistics.median(1000 * record["cpu_s_per_mb"] for record in found)
        print(
            f"| {label} | {name} | {len(found)} | {statistics.median(speeds):.1f} "
            f"({min(speeds):.1f} to {max(speeds):.1f}) | {cpu:.1f} |"
        )


def work(options: argparse.Namespace) -> None:
    """Everything but the tokenizer's own call."""
    command = [sys.executable, str(CONTENDERS), "work", "--input", str(options.input), "--passes", str(options.work)]
    done = subprocess.run([*command, "--tokenizer", options.tokenizer], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    rounds = [json.loads(line) for line in done.stdout.splitlines()][1:]
    mb = options.input.stat().st_size / 1e6
    for name in ("theirs", "ours"):
        print(f"{name:8} {1000 * statistics.median(found[name] for found in rounds) / mb:8.2f} CPU ms/MB")
    ratios = [found["theirs"] / found["ours"] for found in rounds]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of {len(rounds)} pairs")


def main() -> None:
    """Measure, or summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a jsonl file with a text field")
    parser.add_argument("--tokenizer", help='as JSON: {"tokenizer_type": ..., "tokenizer_model": ...}')
    parser.add_argument("--label", default="", help="name of the tokenizer in the table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--copies", type=int, default=4, help="of the input, an even number")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="these contenders")
    parser.add_argument("--fast", action="store_true", help="with --tokenizer-engine gigatoken too")
    parser.add_argument(
        "--datatrove", action="store_true", help="installed in this environment; Hugging Face tokenizers"
    )
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM that runs in this environment")
    parser.add_argument("--results", type=Path, default=Path("preprocess.jsonl"))
    parser.add_argument("--summary", action="store_true", help="print medians of --results")
    parser.add_argument("--work", type=int, metavar="N", help="everything but the tokenizer's own call, N pairs")
    options = parser.parse_args()
    if options.summary:
        return summary(options.results)
    if options.work:
        return work(options)
    with tempfile.TemporaryDirectory(dir=options.results.resolve().parent) as name:
        folder = Path(name)
        content = options.input.read_bytes()
        for copies in (1, options.copies):
            (folder / f"{copies}.jsonl").write_bytes(content * copies)
            (folder / f"parts{copies}").mkdir()
        # Two files of half the text, or so many whole ones: shards of equal size.
        middle = content.index(b"\n", len(content) // 2) + 1
        for number, half in enumerate((content[:middle], content[middle:])):
            (folder / "parts1" / f"{number}.jsonl").write_bytes(half)
        for number in range(options.copies):
            (folder / f"parts{options.copies}" / f"{number}.jsonl").write_bytes(content)
        for _ in range(options.repeats):
            one_round(options, folder)


if __name__ == "__main__":
    main()
