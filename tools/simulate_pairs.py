"""Compares pair schedules on a judge of known noise: ``tools/simulate_pairs.py [--candidates 17] [--accuracy 0.8]``.

Prints, per schedule, what it asks and which share of all pairs' true chosen-minus-rejected margin it reaches.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.teacher.simulation import World, schedules, simulate
from tools._help import HelpFormatter, Parser


def main() -> None:
    """Parse the command line, play, print a Markdown table."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000, help="groups of candidates to judge (default 20000)")
    parser.add_argument("--candidates", type=int, default=17, help="candidates of each (default 17)")
    parser.add_argument("--accuracy", type=float, default=0.8, help="of one vote at the median gap (default 0.8)")
    parser.add_argument("--offset", type=float, default=0.0, help="what a pointwise criterion that 70 %% meet adds")
    parser.add_argument("--budget", type=int, default=0, help="comparisons of best_worst (default: its own)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.candidates < 2 or arguments.prompts < 1 or not 0.5 < arguments.accuracy < 1:
        parser.error("give at least 1 prompt, 2 candidates, and an accuracy between 0.5 and 1")
    world = World(arguments.prompts, arguments.candidates, arguments.accuracy, arguments.offset, arguments.seed)
    print(
        "| schedule | comparisons | of all pairs | rounds | true margin | of all pairs | best found | worst found | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    makers = schedules(arguments.candidates, arguments.budget)
    base = None
    for name in ("all", "pivot", "circular", "knock-out", "best_worst"):
        start = time.perf_counter()
        found = simulate(makers[name], world)
        base = base or found
        print(
            f"| {name} | {found.comparisons:.1f} | {found.comparisons / base.comparisons:.1%} | {found.rounds} "
            f"| {found.margin:.3f} | {found.margin / base.margin:.1%} | {found.best_found:.1%} "
            f"| {found.worst_found:.1%} | {time.perf_counter() - start:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
