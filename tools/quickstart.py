#!/usr/bin/env python
"""The whole of Self-Improving Pretraining on this machine, from gathered text to an HTML report (see README.md).

Each stage is one command that is printed before it runs, so that every one can be repeated, changed and run alone.
A stage whose output is already there is skipped; ``--fresh`` starts over. ``--text`` takes text of yours in place of
what is gathered:

    tools/quickstart.py --text corpus.jsonl --run-dir runs/mine
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("policy", "judge", "judge2", "validation", "test")
SHARES = "policy:0.68,judge:0.12,judge2:0.12,validation:0.04,test:0.04"
"""Of a text of one's own, by document."""
VOCABULARY_SIZE = 3000
DEFAULT_RUN_DIR = ROOT / "runs" / "quickstart"


@dataclass(frozen=True)
class Stage:
    """One command of the quickstart, what it leaves behind, and its usual time on 2 cores."""

    title: str
    command: list[str]
    output: Path
    expected_s: float
    always: bool = False


def _tool(name: str, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / name), *map(str, flags)]


def data_stages(data: Path, text: Sequence[Path] = ()) -> list[Stage]:
    """From ``text``, or the text on this machine, to tokenized splits and fitted judges, all under ``data``."""
    tokenizer = data / "tokenizer.model"
    tokenizer_flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
    found = []
    if not text:
        title = "gather documentation and docstrings of installed Python packages, split by document"
        gather = _tool("gather_corpus.py", "--output-dir", data / "text")
        found.append(Stage(title, gather, data / "text" / "sources.json", 20))
    learnt_from = text or [data / "text" / "policy.jsonl"]
    train = _tool("train_tokenizer.py", "--input", *learnt_from, "--output", tokenizer, "--vocab-size", VOCABULARY_SIZE)
    found.append(Stage(f"train a SentencePiece tokenizer ({VOCABULARY_SIZE} pieces)", train, tokenizer, 20))
    for split in SPLITS:
        source = [*text, "--splits", SHARES, "--split", split] if text else [data / "text" / f"{split}.jsonl"]
        flags = ["--input", *source, "--json-keys", "text", "--output-prefix", data / split, "--workers", 2]
        command = _tool("preprocess_data.py", *flags, *tokenizer_flags, "--append-eod")
        found.append(
            Stage(f"tokenize the {split} split into .bin/.idx", command, data / f"{split}_text_document.idx", 3)
        )
    for split, order in (("judge", "4"), ("judge2", "5")):
        flags = ["--data-path", data / f"{split}_text_document", "--order", order, "--output", data / f"{split}.npz"]
        title = f"fit the embedded n-gram judge of order {order} on the {split} split"
        found.append(Stage(title, _tool("fit_judge.py", *flags, *tokenizer_flags), data / f"{split}.npz", 5))
    return found


def all_stages(run_dir: Path, config: Path, num_ranks: int, extra: list[str], text: Sequence[Path] = ()) -> list[Stage]:
    """Every command of the quickstart, in order."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    data = run_dir / "data"
    # Named here, so that --run-dir moves all of it.
    paths = ["--run-dir", run_dir, "--tokenizer-model", data / "tokenizer.model", "--judge-model", data / "judge.npz"]
    paths += ["--data-path", data / "policy_text_document", "--valid-data-path", data / "validation_text_document"]
    train = [*launch, str(ROOT / "pretrain_sip.py"), "--config", str(config), *map(str, paths), *extra]
    report = [sys.executable, str(ROOT / "tools" / "report.py"), str(run_dir)]
    return [
        *data_stages(run_dir / "data", text),
        Stage(f"pretrain on {num_ranks} ranks: warm-up, rewrites, rollouts", train, run_dir / "finished.json", 480),
        Stage("write the report", report, run_dir / "report.html", 5, always=True),
    ]


def run_stage(stage: Stage, index: int, total: int, remaining_s: float) -> float:
    """Runs one stage and returns its wall time in seconds; a stage that fails ends the quickstart."""
    print(
        f"\n[{index}/{total}] {stage.title}  (about {max(1, round(remaining_s / 60))} min to go on 2 idle cores)",
        flush=True,
    )
    print("  $ " + shlex.join(_relative(part) for part in stage.command), flush=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false")
    environment.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    status = _status(stage.command, environment)
    if status:
        raise SystemExit(
            f"quickstart: stage {index} ({stage.title}) ended with status {status}. Mend what it names above and "
            "repeat the command: finished stages are not repeated, and training goes on from its last checkpoint."
        )
    return time.monotonic() - started


def _status(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Exit status of a command. Ctrl-C reaches it too: what it saves then is waited for."""
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # a second one: leave it alone
                process.wait()
            raise SystemExit(
                "\nquickstart: interrupted. Repeat the command: finished stages are not repeated, and training goes on "
                "from its last checkpoint."
            ) from None


def _relative(part: str) -> str:
    return part.removeprefix(str(ROOT) + os.sep)


def run(todo: list[Stage]) -> dict[str, float]:
    """Runs what is not done yet; returns seconds by stage title."""
    times: dict[str, float] = {}
    for index, stage in enumerate(todo, start=1):
        if stage.output.exists() and not stage.always:
            print(f"[{index}/{len(todo)}] {stage.title}: already done", flush=True)
            continue
        remaining_s = sum(later.expected_s for later in todo[index - 1 :])
        times[stage.title] = run_stage(stage, index, len(todo), remaining_s)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="everything goes here")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="JSONL",
        help="documents of your own, one JSON object with a text a line, in place of those gathered here (give a "
        "--run-dir too)",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "recipes" / "quickstart.yaml")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that torchrun starts")
    parser.add_argument("--data-only", action="store_true", help="stop before training")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier quickstart left and start over")
    parser.add_argument("extra", nargs="*", help="more flags for pretrain_sip.py, after a lone --")
    options = parser.parse_args()
    missing = [path for path in options.text if not path.is_file()]
    if missing:
        parser.error(f"--text {missing[0]}: there is no such file")
    run_dir = options.run_dir.resolve()
    if options.text and run_dir == DEFAULT_RUN_DIR:
        parser.error("--text: give a --run-dir of its own, since runs/quickstart is of the gathered text")
    if options.fresh and run_dir.exists():
        shutil.rmtree(run_dir)
    (run_dir / "data").mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    todo = all_stages(
        run_dir, options.config.resolve(), options.num_ranks, options.extra, [path.resolve() for path in options.text]
    )
    times = run(todo[:-2] if options.data_only else todo)
    (run_dir / "stage_times.json").write_text(json.dumps(times, indent=1) + "\n")
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} min. Look at:")
    for name in ("report.html", "metrics.jsonl", "tensorboard", "checkpoints"):
        if (run_dir / name).exists():
            print(f"  {_relative(str(run_dir / name))}")


if __name__ == "__main__":
    main()
