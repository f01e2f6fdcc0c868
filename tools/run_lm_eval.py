"""Scores a policy with lm-evaluation-harness: a Megatron checkpoint at any layout, or what a vLLM server serves.

    pip install 'megatron-sip[lm-eval]'
    torchrun --nproc-per-node 2 tools/run_lm_eval.py --config OUTPUT/recipe.yaml --tensor-model-parallel-size 2
    tools/run_lm_eval.py --tasks my_task --include-path my_tasks/ --config RECIPE --load runs/x/checkpoints
    tools/run_lm_eval.py --endpoint http://HOST:8000 --served-model-name policy --tokenizer EXPORTED_DIR

OUTPUT/recipe.yaml is what tools/convert_checkpoint.py writes; all flags of pretrain_sip.py are known. --tasks paper,
the default, are the paper's eight (MMLU with 5 examples, the others with none) and their plain mean. --include-path
names a folder of local task files, which need no network. A server is asked through the harness's own
local-completions; tools/export_policy.py prints the command that starts one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import load
from megatron_sip.errors import ConfigurationError, SIPError
from megatron_sip.evaluation.lm_eval_tasks import METRICS, TaskOptions, means, run_tasks, table
from megatron_sip.train.config import TrainConfig
from megatron_sip.train.failures import failures_end_the_job, say_once_per_node

if TYPE_CHECKING:
    from megatron_sip.distributed import ParallelContext


_UNUSED = ["--train-iters", "1", "--data-path", "unused", "--eval-iters", "0", "--curriculum", "ntp:1"]
"""What a run needs and this does not: corpora and a judge are not looked at."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig | None]:
    """The harness's options, and those of the training that the policy comes from; None for a server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tasks", default="paper", help="names, separated by commas; paper is the paper's eight")
    parser.add_argument("--include-path", help="folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt [as the task says; mmlu 5]")
    parser.add_argument("--limit", type=int, help="documents per task [all]")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of a forward pass [16384]")
    parser.add_argument("--output", type=Path, help="JSON file with all results")
    server = parser.add_argument_group("a vLLM server in place of a checkpoint")
    server.add_argument("--endpoint", help="its URL, http://HOST:PORT")
    server.add_argument("--served-model-name", help="name to ask it for")
    server.add_argument("--tokenizer", help="model directory with the policy's tokenizer")
    server.add_argument("--max-length", type=int, default=2048, help="its longest sequence [2048]")
    server.add_argument("--concurrent", type=int, default=16, help="requests at once [16]")
    own, rest = parser.parse_known_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigurationError("lm-evaluation-harness is not installed: pip install 'megatron-sip[lm-eval]'")
    if own.endpoint is not None:
        if rest or not own.served_model_name or not own.tokenizer:
            problem = f"{rest[0]} has no use" if rest else "--served-model-name or --tokenizer is missing"
            raise ConfigurationError(f"{problem} with --endpoint: give both of these, and no flags of pretrain_sip.py")
        return own, None
    config = load(TrainConfig, [*_UNUSED, *rest], prog="run_lm_eval.py")
    if config.checkpoint.load is None and config.checkpoint.pretrained_checkpoint is None:
        raise ConfigurationError("name the checkpoint: --load DIR, or --pretrained-checkpoint DIR")
    return own, config


def task_options(own: argparse.Namespace) -> TaskOptions:
    """Those of the command line."""
    return TaskOptions(own.tasks, own.include_path, own.num_fewshot, own.limit)


def score_checkpoint(own: argparse.Namespace, config: TrainConfig, context: ParallelContext) -> dict[str, Any]:
    """Results by task, on rank 0 all of them."""
    from megatron_sip.evaluation.lm_eval_model import MegatronLM
    from megatron_sip.evaluation.scoring import PolicyScorer
    from megatron_sip.train.build import build_policy
    from megatron_sip.train.weights import load_weights

    policy = build_policy(config, context)
    directory = config.checkpoint.load or config.checkpoint.pretrained_checkpoint
    assert directory is not None
    load_weights(policy.chunks, policy.identity, directory, config.checkpoint.ckpt_step, context)
    scorer = PolicyScorer(policy.chunks, context, policy.tokenizer.vocab_size)
    length = config.model.resolve().max_position_embeddings
    model = MegatronLM(scorer, policy.rollouts, policy.tokenizer, context, length, own.batch_tokens)
    return run_tasks(model, task_options(own))


def score_server(own: argparse.Namespace) -> dict[str, Any]:
    """Results by task."""
    arguments = {
        "model": own.served_model_name,
        "base_url": f"{own.endpoint.rstrip('/')}/v1/completions",
        "tokenizer": own.tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": own.concurrent,
        "max_length": own.max_length,
    }
    return run_tasks("local-completions", task_options(own), arguments)


def report(results: dict[str, Any], own: argparse.Namespace, policy: dict[str, Any]) -> None:
    """Prints the table and writes the JSON file. ``policy``: what was scored."""
    print(table(results))
    if own.output is not None:
        content = {"results": results, "means": {name: means(results, name) for name in METRICS}, "policy": policy}
        own.output.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    try:
        own, config = parse(argv)
        if config is None:
            report(score_server(own), own, {"endpoint": own.endpoint, "model": own.served_model_name})
            return 0
        config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    except SIPError as error:
        say_once_per_node(error)
        return 2
    from megatron_sip.distributed import initialize

    with failures_end_the_job():
        context = initialize(config.parallel, config.training.seed)
        results = score_checkpoint(own, config, context)
        if context.rank == 0:
            report(results, own, {"parallel": dataclasses.asdict(config.parallel)})
        context.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
