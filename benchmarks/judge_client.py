"""Judged requests per second and core, against a server that answers after 50 ms, and the same through ``openai``.

    python benchmarks/judge_client.py --openai-python PATH/TO/bin/python --rounds 5

The client runs on core 0, the server (answering_server.py) on core 1. A judged request (``judge``) is a whole question:
prompt rendered from its template, JSON, HTTP, answer read, verdict found, put together with the others of its group.
``client`` leaves out what comes before and after HTTP. Runs are paired: a round has one of every
kind, in changing order. On a machine that others use, requests per CPU second of the client's process say more.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import functools
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http.client import ChatClient, ClientSettings
from megatron_sip.teacher.interfaces import JudgeGroup, JudgeRequest, Passage

HERE = Path(__file__).resolve().parent
CANDIDATES = 17
PAIRS = CANDIDATES * (CANDIDATES - 1) // 2


def teacher_config(url: str, in_flight: int, ledger: str) -> TeacherConfig:
    """One vote a request, so that every verdict is a request."""
    return TeacherConfig(
        teacher="http",
        judge_endpoints=(url,),
        judge_served_model="m",
        judge_max_in_flight=in_flight,
        judge_ledger=ledger,
    )


def groups(count: int, prefix_characters: int) -> tuple[JudgeGroup, ...]:
    """Prefix as long as asked, continuations of 600 characters."""
    none = np.zeros(0, dtype=np.int64)

    def passage(text: str) -> Passage:
        return Passage(none, text)

    kinds = ("suffix", *["rollout"] * (CANDIDATES - 1))
    return tuple(
        JudgeGroup(
            number,
            passage("x" * prefix_characters),
            passage("reference"),
            tuple(passage(f"{number} {candidate} " + "y" * 600) for candidate in range(CANDIDATES)),
            kinds,
        )
        for number in range(count)
    )


async def judge_load(url: str, requests: int, in_flight: int, prefix_characters: int, ledger: str) -> int:
    """All pairs of as many groups as it takes. Returns the verdicts that came."""
    panel = build_teacher(teacher_config(url, in_flight, ledger), rewriting=False)
    result = await panel.judge(JudgeRequest(groups(max(1, requests // PAIRS), prefix_characters)))
    await panel.aclose()
    return sum(group.num_calls - group.num_failures for group in result.groups)


async def client_load(url: str, requests: int, in_flight: int, prefix_characters: int) -> int:
    """The client by itself."""
    settings = ClientSettings(in_flight, 10.0, 60.0, 60.0, 120.0, 3, 0.5, 30.0, 5, 1.0, 0.0, 0.0)
    client = ChatClient([url], settings)
    prompt = "x" * (prefix_characters + 1200)

    def body(number: int) -> dict[str, object]:
        return {"model": "m", "messages": [{"role": "user", "content": f"{prompt}{number}"}]}

    answers = await asyncio.gather(*(client.complete(functools.partial(body, i)) for i in range(requests)))
    await client.close()
    return sum(hasattr(answer, "choices") for answer in answers)


def measure(kind: str, url: str, arguments: argparse.Namespace) -> dict[str, float]:
    """In a process of its own on core 0."""
    sizes = [str(x) for x in (arguments.requests, arguments.in_flight, arguments.prefix_characters)]
    if kind == "openai":
        sizes[0] = str(arguments.openai_requests or arguments.requests)
        sizes[2] = str(arguments.prefix_characters + 1200)
        command = [arguments.openai_python, str(HERE / "openai_load.py"), url, *sizes]
    else:
        command = [sys.executable, str(Path(__file__)), "--one", kind, url, *sizes, arguments.ledger]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {0})
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(kind: str, url: str, requests: str, in_flight: str, prefix_characters: str, ledger: str = "") -> None:
    """Run one load here and print what it took."""
    sizes = int(requests), int(in_flight), int(prefix_characters)
    wall, cpu = time.perf_counter(), time.process_time()
    load = judge_load(url, *sizes, ledger) if kind == "judge" else client_load(url, *sizes)
    if profiling := os.environ.get("PROFILE_TO"):
        profiler = cProfile.Profile()
        verdicts = profiler.runcall(asyncio.run, load)
        with open(profiling, "w", encoding="utf-8") as file:
            pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(45)
    else:
        verdicts = asyncio.run(load)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"verdicts": verdicts, "wall_s": wall, "cpu_s": cpu}))


def main() -> None:
    """Parse the command line, measure, print a Markdown table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openai-python", help="interpreter of an environment with the openai package [leave it out]")
    parser.add_argument("--rounds", type=int, default=5, help="of paired runs [5]")
    parser.add_argument("--requests", type=int, default=8160, help="of each run, whole groups of 136 [8160]")
    parser.add_argument("--openai-requests", type=int, help="of each run through openai, which is slow [--requests]")
    parser.add_argument("--in-flight", type=int, default=512, help="requests under way at most [512]")
    parser.add_argument("--prefix-characters", type=int, default=2000, help="of every prompt [2000]")
    parser.add_argument("--delay-ms", type=float, default=50.0, help="of the server [50]")
    parser.add_argument("--ledger", default="", help="let judges keep their verdicts here [no ledger]")
    parser.add_argument("--kinds", nargs="+", default=["client", "judge"], choices=["client", "judge"])
    arguments = parser.parse_args()
    kinds = [*arguments.kinds, *(["openai"] if arguments.openai_python else [])]
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    server = subprocess.Popen(
        [sys.executable, str(HERE / "answering_server.py"), "--core", "1", "--delay-ms", str(arguments.delay_ms)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        for number in range(arguments.rounds):
            for kind in kinds if number % 2 else reversed(kinds):
                found[kind].append(measure(kind, url, arguments))
    finally:
        server.kill()
        server.wait()
    columns = "load", "requests", "verdicts", "wall s", "CPU s", "requests/s", "per CPU second"
    print("|", " | ".join([*columns, "requests/s of each run", "per CPU second of each run"]), "|")
    print("|---|---|---|---|---|---|---|---|---|")
    sizes = dict.fromkeys(kinds, arguments.requests) | {"openai": arguments.openai_requests or arguments.requests}
    for kind, runs in found.items():
        rates = [run["verdicts"] / run["wall_s"] for run in runs]
        cpu_rates = [run["verdicts"] / run["cpu_s"] for run in runs]
        middle = {name: statistics.median(run[name] for run in runs) for name in ("verdicts", "wall_s", "cpu_s")}
        label = f"{kind} ({runs[0]['versions']})" if kind == "openai" else kind
        print(
            f"| {label} | {sizes[kind]} | {middle['verdicts']:.0f} | {middle['wall_s']:.2f} "
            f"| {middle['cpu_s']:.2f} | {statistics.median(rates):.0f} | {statistics.median(cpu_rates):.0f} "
            f"| {' '.join(f'{rate:.0f}' for rate in rates)} | {' '.join(f'{rate:.0f}' for rate in cpu_rates)} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        main()
