"""What ``tools/train_judge.py`` and ``tools/train_rewriter.py`` run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_sip.errors import ConfigurationError, SIPError
from megatron_sip.train.failures import failures_end_the_job, say_once_per_node
from megatron_sip.train.grpo.config import load_grpo_config


def main(argv: Sequence[str], task: str) -> int:
    """Trains the ``task`` "judge" or "rewriter"; returns the exit status: 2 for a configuration that cannot work, 1 for
    other failures. What a user can mend is printed as one line."""
    logging.basicConfig(level=logging.WARNING, format=" [%(levelname)s] %(message)s")
    try:
        config = load_grpo_config(argv, task)
        config.check_layout(int(os.environ.get("WORLD_SIZE", "1")))
    except SIPError as error:
        say_once_per_node(error)
        return 2 if isinstance(error, ConfigurationError) else 1
    # Imported here, so that --help answers at once.
    from megatron_sip.checkpoint import StopSignals
    from megatron_sip.distributed import initialize
    from megatron_sip.train.grpo.build import build_grpo_trainer

    with failures_end_the_job():
        context = initialize(config.parallel, config.task.seed)
        with StopSignals() as signals, build_grpo_trainer(config, task, context, signals) as trainer:
            trainer.load()
            end = trainer.run()
            if end.finished and context.rank == 0 and config.observability.run_dir is not None:
                finished = Path(config.observability.run_dir) / "finished.json"
                temporary = finished.with_suffix(".tmp")
                temporary.write_text(json.dumps({"step": end.step}) + "\n", encoding="utf-8")
                os.replace(temporary, finished)
        context.shutdown()
    return end.exit_code
