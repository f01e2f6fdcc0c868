"""Scores a Megatron checkpoint with lm-evaluation-harness, alone or under torchrun at any TP x PP x DP.

    pip install lm_eval
    torchrun --nproc-per-node 2 tools/run_lm_eval.py --config OUTPUT/recipe.yaml --tensor-model-parallel-size 2
    tools/run_lm_eval.py --tasks my_task --include-path my_tasks/ --config RECIPE --load runs/x/checkpoints

OUTPUT/recipe.yaml is what tools/convert_checkpoint.py writes; all flags of pretrain_sip.py are known. --tasks paper,
the default, are the paper's eight (MMLU with 5 examples, the others with none) and their plain mean. --include-path
names a folder of local task files, which need no network. A server of vLLM is scored by the harness's own
`lm_eval --model local-completions`.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import load
from megatron_sip.distributed import ParallelContext, initialize
from megatron_sip.errors import ConfigurationError, SIPError
from megatron_sip.evaluation.lm_eval_tasks import METRICS, PAPER_TASKS, means, table
from megatron_sip.evaluation.scoring import PolicyScorer
from megatron_sip.train.build import build_policy
from megatron_sip.train.config import TrainConfig
from tools.evaluate import load_weights


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """The harness's own options, and those of the training that the policy comes from."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tasks", default="paper", help="names, separated by commas; paper is the paper's eight")
    parser.add_argument("--include-path", help="folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt [as the task says; mmlu 5]")
    parser.add_argument("--limit", type=int, help="documents per task [all]")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of a forward pass [16384]")
    parser.add_argument("--output", type=Path, help="JSON file with all results")
    own, rest = parser.parse_known_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigurationError("lm-evaluation-harness is not installed: pip install lm_eval")
    # What a run needs and this does not: neither is looked at.
    config = load(
        TrainConfig, ["--train-iters", "1", "--data-path", "unused", "--eval-iters", "0", *rest], prog="run_lm_eval.py"
    )
    if config.checkpoint.load is None and config.checkpoint.pretrained_checkpoint is None:
        raise ConfigurationError("name the checkpoint: --load DIR, or --pretrained-checkpoint DIR")
    return own, config


def run(own: argparse.Namespace, config: TrainConfig, context: ParallelContext) -> dict[str, Any]:
    """Results by task, equal on all ranks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megatron_sip.evaluation.lm_eval_model import MegatronLM

    policy = build_policy(config, context)
    directory = config.checkpoint.load or config.checkpoint.pretrained_checkpoint
    assert directory is not None
    load_weights(policy, directory, config.checkpoint.ckpt_step, context)
    scorer = PolicyScorer(policy.chunks, context, policy.tokenizer.vocab_size)
    length = config.model.resolve().max_position_embeddings
    model = MegatronLM(scorer, policy.rollouts, policy.tokenizer, context, length, own.batch_tokens)
    manager = TaskManager(include_path=own.include_path)
    names = PAPER_TASKS if own.tasks == "paper" else {name: None for name in own.tasks.split(",")}
    results: dict[str, Any] = {}
    for name, num_fewshot in names.items():
        found = simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=num_fewshot if own.num_fewshot is None else own.num_fewshot,
            limit=own.limit,
            task_manager=manager,
            log_samples=False,
        )
        assert found is not None
        results.update({task: values for task, values in found["results"].items() if task in names})
    return results


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    try:
        own, config = parse(argv)
        config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    except SIPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    context = initialize(config.parallel, config.training.seed)
    try:
        results = run(own, config, context)
    except SIPError as error:
        print(f"error on rank {context.rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # other ranks may wait in a collective for this one
    if context.rank == 0:
        print(table(results))
        if own.output is not None:
            content = {"results": results, "means": {name: means(results, name) for name in METRICS}}
            content["parallel"] = dataclasses.asdict(config.parallel)
            own.output.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    context.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
