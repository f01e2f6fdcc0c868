"""Exports a policy to a directory for vLLM or transformers, and prints the command that serves it.

    tools/export_policy.py CHECKPOINT OUTPUT [--like HF_DIR] [--tensor-parallel-size 2] [--port 8000]
    tools/export_policy.py CHECKPOINT OUTPUT --for-rollouts       then: pretrain_sip.py --rollout-engine vllm ...
    tools/export_policy.py CHECKPOINT OUTPUT --for-rollouts --cpu --weight-transfer gloo       on this machine's CPUs

CHECKPOINT is what --save was, or what tools/convert_checkpoint.py to-megatron made. A tokenizer of transformers' goes
along. A policy that was trained from scratch with a SentencePiece tokenizer has none: it is served by token ids
(--skip-tokenizer-init).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.errors import ConfigurationError, SIPError
from tools._help import HelpFormatter
from tools.convert_checkpoint import add_dtype_option, add_export_options, export

if TYPE_CHECKING:
    from megatron_sip.checkpoint.huggingface.convert import Converted


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what --save was, or one iter_* directory")
    parser.add_argument("output", type=Path, help="new directory")
    add_dtype_option(parser)
    add_export_options(parser, rows="the tokens: a server samples no others")
    parser.add_argument(
        "--for-rollouts", action="store_true",
        help="let the server take new weights from a run with --rollout-engine vllm: whoever reaches it can give them",
    )  # fmt: skip
    parser.add_argument(
        "--weight-transfer",
        choices=("files", "gloo", "nccl"),
        default="files",
        help="--rollout-weight-transfer of that run [files]; gloo: a server on CPU, which imports this package",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="print the command for vLLM's CPU build; with --for-rollouts the output layer is untied, as that needs",
    )
    parser.add_argument("--served-model-name", help="name that clients ask for [the output's]")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of the server [1]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at [8000]")
    options = parser.parse_args(argv)
    if not 1 <= options.port <= 65535:
        parser.error(f"--port {options.port}: give a number from 1 to 65535")
    if options.weight_transfer != "files" and not options.for_rollouts:
        parser.error(f"--weight-transfer {options.weight_transfer} has no use without --for-rollouts: add that")
    if options.weight_transfer == "nccl" and options.cpu:
        parser.error("--weight-transfer nccl is between GPUs: with --cpu give gloo or files")
    if options.weight_transfer == "gloo" and not options.cpu:
        parser.error("--weight-transfer gloo is for servers on CPU: add --cpu, or give nccl or files")
    return options


def check_tensor_parallel(model: Path, size: int) -> None:
    """Whether vLLM can split the model so. Raises ConfigurationError."""
    from megatron_sip.huggingface.config_json import CONFIG, architecture_of, read_config

    architecture = architecture_of(read_config(model), model / CONFIG)
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    if size < 1 or heads % size or (groups % size and size % groups):
        raise ConfigurationError(
            f"--tensor-parallel-size {size}: vLLM cannot split {heads} heads and {groups} key-value heads so; give a "
            f"divisor of {heads}"
        )


def serve_command(converted: Converted, options: argparse.Namespace) -> str:
    """The line that serves an exported policy."""
    words = ["vllm", "serve", str(converted.directory)]
    if options.cpu:  # `vllm serve` asks for the version of a package that has another name there
        words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(converted.directory)]
    words += ["--served-model-name", options.served_model_name or converted.directory.name]
    words += ["--host", options.host, "--port", str(options.port)]
    words += ["--dtype", str(converted.dtype).removeprefix("torch.")]
    words += ["--max-model-len", str(converted.architecture.max_position_embeddings)]
    words += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if not converted.has_tokenizer:
        words.append("--skip-tokenizer-init")
    if options.cpu:
        # Without compilation no C++ compiler is needed; a seed on a chunked prompt ends vLLM 0.32 on a CPU.
        batch = max(8192, converted.architecture.max_position_embeddings)
        words += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(batch)]
    if options.for_rollouts:
        words += ["--enable-scale-out", "--logprobs-mode", "raw_logprobs", *_transfer_flags(options.weight_transfer)]
    return " ".join([*_environment(options), shlex.join(words)])


def _transfer_flags(transfer: str) -> list[str]:
    if transfer == "files":
        return []
    flags = ["--weight-transfer-config", json.dumps({"backend": transfer})]
    if transfer == "gloo":
        flags += ["--worker-extension-cls", "megatron_sip.rollout.vllm.gloo_worker.GlooTransfer"]
    return flags


def _environment(options: argparse.Namespace) -> list[str]:
    """Assignments before the command."""
    names = []
    if options.for_rollouts:
        names.append("VLLM_SERVER_DEV_MODE=1")
        if options.weight_transfer == "gloo":
            names.append(f"PYTHONPATH={shlex.quote(str(Path(__file__).resolve().parent.parent))}")
    if options.cpu:
        names += ["TORCH_COMPILE_DISABLE=1", "VLLM_CPU_KVCACHE_SPACE=1"]
    return names


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    options = parse(argv)
    try:
        options.vocab_rows = options.vocab_rows or 0
        options.untie = options.untie or (options.cpu and options.for_rollouts)
        converted = export(
            options.checkpoint, options, lambda partial: check_tensor_parallel(partial, options.tensor_parallel_size)
        )
    except (SIPError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not converted.has_tokenizer and not options.for_rollouts:
        print(
            f"note: {converted.directory} has no tokenizer of transformers', so that its server answers to token ids "
            "and to no chat: it cannot be a judge or a rewriter (--teacher model takes the checkpoint itself; --like "
            "HF_DIR takes a tokenizer along)",
            file=sys.stderr,
        )
    print(serve_command(converted, options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
