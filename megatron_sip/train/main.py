"""The entry point behind ``pretrain_sip.py``: options, process groups, run, exit status."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_sip.errors import ConfigurationError, SIPError
from megatron_sip.files import write_text
from megatron_sip.train.checks import check_layout, require_present
from megatron_sip.train.config import TrainConfig, load_train_config
from megatron_sip.train.failures import failures_end_the_job, say_once_per_node, signals_end_the_start


def main(argv: Sequence[str]) -> int:
    """Runs training; returns the exit status: 2 for a configuration that cannot work, 1 for other failures.

    A dry run of what could not start here, because something is missing or does not fit, is a failure too.

    What a user can mend is printed as one line.
    """
    logging.basicConfig(level=logging.WARNING, format=" [%(levelname)s] %(message)s")
    try:
        config = load_train_config(argv)
        if config.training.dry_run:
            from megatron_sip.train.dry_run import dry_run

            report, is_ready = dry_run(config, os.environ)
            print(report)
            return 0 if is_ready else 1
        check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
        require_present(config)
    except SIPError as error:
        say_once_per_node(error)
        return 2 if isinstance(error, ConfigurationError) else 1
    return _train(config)


def _train(config: TrainConfig) -> int:
    with failures_end_the_job(), signals_end_the_start(), ExitStack() as noting:
        # Imported here: --help and --dry-run answer at once, and a signal in these seconds is answered too.
        from megatron_sip.checkpoint import StopSignals
        from megatron_sip.distributed import initialize
        from megatron_sip.train.build import build_trainer

        context = initialize(config.parallel, config.training.seed)
        signals = StopSignals()
        with build_trainer(config, context, signals) as trainer:
            trainer.load()
            # Until all is closed: a rank that has lost another gets torchrun's SIGTERM before it has said so.
            noting.enter_context(signals)
            end = trainer.run()
            if end.finished and context.rank == 0 and config.observability.run_dir is not None:
                _mark_finished(Path(config.observability.run_dir), end.step)
        context.shutdown()
    return end.exit_code


def _mark_finished(run_dir: Path, step: int) -> None:
    """``finished.json`` says that the run has done all of its steps."""
    write_text(run_dir / "finished.json", json.dumps({"step": step}) + "\n")
