"""Compares two checkpoints on unseen prefixes by win rate, with guards against a policy that hacks its judge.

    tools/evaluate.py --config examples/recipes/quickstart.yaml --tensor-model-parallel-size 1 \\
        --checkpoint runs/quickstart/checkpoints --baseline runs/quickstart/checkpoints --baseline-step 400 \\
        --second-judge runs/quickstart/data/judge2.npz

Takes the flags and recipes of pretrain_sip.py as well (model, tokenizer, --test-data-path, --seed, ...;
pretrain_sip.py --help lists them), and runs alone or under torchrun; the layout need not be that of the training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import load
from megatron_sip.errors import ConfigurationError, SIPError
from megatron_sip.evaluation.config import EvaluationConfig
from megatron_sip.files import require_folder_of, write_text
from megatron_sip.observability.jsonl import finite
from megatron_sip.train.checks import missing_policy, require_none
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.failures import failures_end_the_job, say_once_per_node
from tools._help import HelpFormatter

if TYPE_CHECKING:
    from megatron_sip.evaluation import Evaluation

_TYPES: Mapping[str, Callable[[str], Any]] = {
    "checkpoint_step": int,
    "baseline_step": int,
    "num_prefixes": int,
    "temperature": float,
    "num_seeds": int,
    "confidence": float,
}


def parse(argv: Sequence[str]) -> tuple[EvaluationConfig, TrainConfig]:
    """The comparison's own options, and those of the training that the policies come from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(EvaluationConfig):
        if isinstance(field.default, bool):
            parser.add_argument(_flag(field.name), help=field.metadata["help"].removesuffix("."), action="store_true")
            continue
        required = field.default is dataclasses.MISSING
        parser.add_argument(
            _flag(field.name),
            help=field.metadata["help"].removesuffix("."),
            type=_TYPES.get(field.name, str),
            required=required,
            default=None if required else field.default,
            nargs="+" if field.name == "temperature" else None,
        )
    own, rest = parser.parse_known_args(argv)
    values = {**vars(own), "temperature": tuple(own.temperature)}
    options = EvaluationConfig(**values)
    options.validate()
    config = load(TrainConfig, rest, prog="evaluate.py")
    if not config.data.test_data_path:
        raise ConfigurationError("--test-data-path is missing: name a corpus that neither policy was trained on")
    return options, config


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def require_places(options: EvaluationConfig) -> None:
    """Raises ConfigurationError or DataError for a checkpoint that is not there, and for an output without a folder."""
    if options.output is not None:
        require_folder_of(Path(options.output), "--output")
    for name in ("checkpoint", "baseline"):
        directory, step = getattr(options, name), getattr(options, f"{name}_step")
        require_none(list(missing_policy(f"--{name}", directory, step, f"--{name}-step")))


def report(evaluation: Evaluation, options: EvaluationConfig, config: TrainConfig) -> None:
    """Prints the table and writes the JSON file."""
    from megatron_sip.evaluation import render_table

    print(f"\npolicy   {options.checkpoint}\nbaseline {options.baseline}\n\n{render_table(evaluation)}")
    if options.output is not None:
        content = {"options": dataclasses.asdict(options), "seed": config.training.seed, **evaluation.as_dict()}
        write_text(Path(options.output), json.dumps(finite(content), indent=1) + "\n")
        print(f"\nwrote {options.output}")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    try:
        options, config = parse(argv)
        require_places(options)
        config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    except SIPError as error:
        say_once_per_node(error)
        return 2
    # Here, so that --help needs no torch.
    from megatron_sip.distributed import initialize
    from megatron_sip.train.comparison import compare_policies

    with failures_end_the_job():
        context = initialize(config.parallel, config.training.seed)
        evaluation = compare_policies(options, config, context)
        if context.rank == 0:
            report(evaluation, options, config)
        context.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
