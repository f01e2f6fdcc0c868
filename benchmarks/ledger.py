"""What keeping verdicts costs: votes per second and bytes per vote, for steps of 174,080 votes (256 x 136 pairs x 5).

    python benchmarks/ledger.py --steps 2

Each group's votes are looked up first, as a run does, then kept in one transaction. Answers are about 500 characters of
varied prose with a verdict; prompts have a prefix of 7,000 characters and 17 candidates of 600.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from megatron_sip.teacher.interfaces import JudgeGroup, JudgeIdentity, Passage, Verdict
from megatron_sip.teacher.ledger import Asked, Context, Ledger, RawPolicy
from megatron_sip.teacher.ledger.files import segments

Vote = tuple[Asked, tuple[int, ...], Verdict]
GROUPS, CANDIDATES, VOTES = 256, 17, 5
JUDGE = JudgeIdentity("http-quality", "gpt-oss-120b", '{"temperature": 1.0, "top_p": 1.0}')
PROSE = """the option first second continuation prefix more coherent repeats itself less keeps to facts claims date name
sentence follows naturally topic drifts although cut off both plausible however invented detail wrong style"""
WORDS = PROSE.split()


def prose(source: random.Random, characters: int) -> str:
    """Words that compress about as well as text does."""
    words = (source.choice(WORDS) + str(source.randrange(40)) * (source.random() < 0.1) for _ in itertools.count())
    text = ""
    while len(text) < characters:
        text += " ".join(itertools.islice(words, 20)) + " "
    return text[:characters]


def one_group(source: random.Random, number: int, step: int) -> tuple[Context, list[Vote]]:
    """All pairs of a group, in either order, with their votes."""
    empty = np.zeros(0, dtype=np.int64)

    def passage(characters: int) -> Passage:
        return Passage(empty, prose(source, characters))

    kinds = ("suffix", *["rollout"] * (CANDIDATES - 1))
    candidates = tuple(passage(600) for _ in range(CANDIDATES))
    context = Context(number, step, JudgeGroup(number, passage(7000), candidates[0], candidates, kinds))
    votes: list[Vote] = []
    for pair in itertools.combinations(range(CANDIDATES), 2):
        for vote in range(VOTES):
            options = pair if source.random() < 0.5 else (pair[1], pair[0])
            prompt = hashlib.sha256(f"{step} {number} {options}".encode()).digest()[:16]
            raw = prose(source, 500) + f"\n\nConclusion: Option {1 + source.randrange(2)}"
            latency = source.lognormvariate(1.0, 0.5)
            votes.append((Asked(prompt, vote), options, Verdict(float(source.randrange(2)), raw, latency_s=latency)))
    return context, votes


def _mixed(prompt: bytes, salt: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(prompt, salt, strict=True))


def measure(mode: str, steps: int, folder: Path) -> None:
    """Prints a line of the table per step."""
    base, source = folder / f"{mode}.sqlite", random.Random(0)
    ledger = Ledger(base, raw=RawPolicy(mode))
    # A few groups' words are enough; keys are new in each group.
    made = [one_group(source, number, 0) for number in range(8)]
    before = 0
    for step in range(steps):
        find_s = add_s = 0.0
        for number in range(GROUPS):
            context, votes = made[number % len(made)]
            salt = hashlib.sha256(f"{mode} {step} {number}".encode()).digest()[:16]
            fresh = [(Asked(_mixed(key.prompt, salt), key.vote), options, given) for key, options, given in votes]
            about = Context(step * GROUPS + number, step, context.source)
            start = time.process_time()
            found = ledger.find("quality", JUDGE, [key for key, _, _ in fresh])
            middle = time.process_time()
            ledger.add("quality", JUDGE, about, fresh)
            add_s, find_s = add_s + time.process_time() - middle, find_s + middle - start
            assert not found
        size = sum(file.path.stat().st_size for file in segments(base))
        count = GROUPS * len(made[0][1])
        print(
            f"| {mode} | {step} | {count} | {find_s:.2f} | {add_s:.2f} | {count / (find_s + add_s):,.0f} "
            f"| {(size - before) / count:.1f} | {len(segments(base))} |",
            flush=True,
        )
        before = size
    assert ledger.count() == steps * GROUPS * len(made[0][1])
    ledger.close()


def main() -> None:
    """Parse the command line, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="of 174,080 votes each [2]")
    parser.add_argument("--raw", nargs="+", default=["none", "sample", "all"], choices=["none", "sample", "all"])
    parser.add_argument("--folder", help="where to write [a temporary folder, removed afterwards]")
    arguments = parser.parse_args()
    print("| words kept | step | votes | look-up CPU s | writing CPU s | votes/CPU s | bytes per vote | files |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for mode in arguments.raw:
            measure(mode, arguments.steps, Path(folder))


if __name__ == "__main__":
    main()
