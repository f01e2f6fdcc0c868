"""What ``tools/train_judge.py`` and ``tools/train_rewriter.py`` run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_sip.errors import ConfigurationError, SIPError
from megatron_sip.files import write_text
from megatron_sip.train.failures import failures_end_the_job, say_once_per_node, signals_end_the_start
from megatron_sip.train.grpo.checks import require_present
from megatron_sip.train.grpo.config import GRPORunConfig, load_grpo_config


def main(argv: Sequence[str], task: str) -> int:
    """Trains the ``task`` "judge" or "rewriter"; returns the exit status: 2 for a configuration that cannot work, 1 for
    other failures, a dry run of what could not start here among them. What a user can mend is printed as one line."""
    logging.basicConfig(level=logging.WARNING, format=" [%(levelname)s] %(message)s")
    try:
        config = load_grpo_config(argv, task)
        if config.task.dry_run:
            from megatron_sip.train.grpo.dry_run import dry_run

            report, is_ready = dry_run(config, task, os.environ)
            print(report)
            return 0 if is_ready else 1
        config.check_layout(int(os.environ.get("WORLD_SIZE", "1")))
        require_present(config, task)
    except SIPError as error:
        say_once_per_node(error)
        return 2 if isinstance(error, ConfigurationError) else 1
    return _train(config, task)


def _train(config: GRPORunConfig, task: str) -> int:
    with failures_end_the_job(), signals_end_the_start(), ExitStack() as noting:
        # Imported here: --help and --dry-run answer at once, and a signal in these seconds is answered too.
        from megatron_sip.checkpoint import StopSignals
        from megatron_sip.distributed import initialize
        from megatron_sip.train.grpo.build import build_grpo_trainer

        context = initialize(config.parallel, config.task.seed)
        signals = StopSignals()
        with build_grpo_trainer(config, task, context, signals) as trainer:
            trainer.load()
            # Until all is closed: a rank that has lost another gets torchrun's SIGTERM before it has said so.
            noting.enter_context(signals)
            end = trainer.run()
            if end.finished and context.rank == 0:
                _mark_finished(config, task, end.step)
        context.shutdown()
    return end.exit_code


def _mark_finished(config: GRPORunConfig, task: str, step: int) -> None:
    """Writes ``finished.json``, which says that the run has done all of its steps, and prints what may come next."""
    if config.observability.run_dir is not None:
        finished = Path(config.observability.run_dir) / "finished.json"
        write_text(finished, json.dumps({"step": step}) + "\n")
    for line in next_commands(config, task):
        print(line, flush=True)


def next_commands(config: GRPORunConfig, task: str) -> list[str]:
    """What a finished ``task`` is good for, one command a line."""
    lines = []
    if config.observability.run_dir is not None:
        lines.append(f"  tools/report.py {config.observability.run_dir}   # its curves")
    saved = config.checkpoint.save
    if saved is not None:
        flag = f"--{task}-checkpoint {saved}"
        if task == "judge":
            lines.append(
                f"  tools/judge_bench.py --teacher model {flag} --examples FILE.valid.jsonl --output VOTES.jsonl"
            )
        lines.append(f"  tools/export_policy.py {saved} HF_DIR   # for vllm serve")
        lines.append(f"  pretrain_sip.py --teacher model {flag} ...   # or, if small, in process")
    return ["next:", *lines] if lines else []
