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
import http.client
import importlib.util
import json
import os
import sys
import urllib.request
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
_UNUSED += ["--seq-length", "2", "--suffix-length", "1", "--min-prefix-length", "1"]
"""What a run needs and this does not: corpora and a judge are not looked at, and sequences are as long as the model."""

_LONGEST = 2048
"""Tokens of a sequence, for a server that does not say."""


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
    server.add_argument("--max-length", type=int, help="longest sequence to ask for, in tokens [the server's]")
    server.add_argument("--concurrent", type=int, default=16, help="requests at once [16]")
    own, rest = parser.parse_known_args(argv)
    _check_own(own)
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


def _check_own(own: argparse.Namespace) -> None:
    """What would end in a traceback, or after hours. Raises ConfigurationError."""
    for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_tokens", 1), ("max_length", 2), ("concurrent", 1)):
        value = getattr(own, name)
        if value is not None and value < least:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {value}: give at least {least}")
    if own.include_path is not None and not Path(own.include_path).is_dir():
        raise ConfigurationError(f"--include-path {own.include_path} is no folder: correct the path")
    if own.output is not None and not own.output.resolve().parent.is_dir():
        raise ConfigurationError(f"--output {own.output}: there is no folder {own.output.parent}: make it first")


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


def check_server(own: argparse.Namespace) -> int:
    """Tokens of the longest sequence to ask for. Raises ConfigurationError: no such server, model or tokenizer."""
    from transformers import AutoTokenizer

    url = f"{own.endpoint.rstrip('/')}/v1/models"
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as response:
            served = {str(model["id"]): model for model in json.load(response)["data"]}
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"--endpoint {own.endpoint} does not list its models ({error}): start the server, or correct the URL "
            "(http://HOST:PORT, without /v1)"
        ) from error
    if own.served_model_name not in served:
        raise ConfigurationError(
            f"--endpoint {own.endpoint} serves {', '.join(served) or 'nothing'}, not {own.served_model_name}: correct "
            "--served-model-name"
        )
    try:
        AutoTokenizer.from_pretrained(own.tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(
            f"--tokenizer {own.tokenizer} has none that transformers can load: {reason}"
        ) from error
    longest = int(served[own.served_model_name].get("max_model_len") or own.max_length or _LONGEST)
    if own.max_length is not None and own.max_length > longest:
        raise ConfigurationError(f"--max-length {own.max_length}: the server's longest sequence has {longest} tokens")
    return int(own.max_length or longest)


def score_server(own: argparse.Namespace) -> dict[str, Any]:
    """Results by task."""
    longest = check_server(own)
    arguments = {
        "model": own.served_model_name,
        "base_url": f"{own.endpoint.rstrip('/')}/v1/completions",
        "tokenizer": own.tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": own.concurrent,
        "max_length": longest,
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
