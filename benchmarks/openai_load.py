"""The load of judge_client.py through the ``openai`` package; started by it, in an environment that has the package.

    python benchmarks/openai_load.py URL REQUESTS IN_FLIGHT PREFIX_CHARACTERS

Prints one JSON object. Needs nothing of this repository.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import time

import openai

httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
"""What openai is built on: httpx2 from its version 3 on."""

_CONCLUSION = re.compile(r"conclusion\s*:\s*option\s*([12])", re.IGNORECASE)


async def load(url: str, requests: int, in_flight: int, prompt: str) -> dict[str, object]:
    """As many workers as requests may be under way, with connections for all of them."""
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    transport = httpx.AsyncClient(limits=limits, timeout=60.0)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", http_client=transport, max_retries=2)
    numbers, verdicts = iter(range(requests)), 0

    async def work() -> None:
        nonlocal verdicts
        for number in numbers:
            answer = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": f"{prompt} {number}"}], temperature=1.0, top_p=1.0,
                max_tokens=2048,
            )  # fmt: skip
            found = _CONCLUSION.findall(answer.choices[0].message.content or "")
            verdicts += bool(found)

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    await client.close()
    return {"verdicts": verdicts, "wall_s": wall, "cpu_s": cpu, "versions": f"openai {openai.__version__}"}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "x" * int(sys.argv[4])))))
