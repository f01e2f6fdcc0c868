"""Exports a policy to a directory for vLLM or transformers, and prints the command that serves it.

    tools/export_policy.py CHECKPOINT OUTPUT [--like HF_DIR] [--tensor-parallel-size 2] [--port 8000]
    tools/export_policy.py CHECKPOINT OUTPUT --for-rollouts       then: pretrain_sip.py --rollout-engine vllm ...

CHECKPOINT is what --save was, or what tools/convert_checkpoint.py to-megatron made. A policy that was trained from
scratch with a SentencePiece tokenizer has no tokenizer of transformers': it is served by token ids
(--skip-tokenizer-init).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.errors import SIPError
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
    parser.add_argument("--served-model-name", help="name that clients ask for [the output's]")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of the server [1]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at [8000]")
    return parser.parse_args(argv)


def serve_command(converted: Converted, options: argparse.Namespace) -> str:
    """The ``vllm serve`` line of an exported policy."""
    words = ["vllm", "serve", str(converted.directory)]
    words += ["--served-model-name", options.served_model_name or converted.directory.name]
    words += ["--host", options.host, "--port", str(options.port)]
    words += ["--dtype", str(converted.dtype).removeprefix("torch.")]
    words += ["--max-model-len", str(converted.architecture.max_position_embeddings)]
    words += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if not converted.has_tokenizer:
        words.append("--skip-tokenizer-init")
    if options.for_rollouts:
        words += ["--enable-scale-out", "--logprobs-mode", "raw_logprobs"]
    return ("VLLM_SERVER_DEV_MODE=1 " if options.for_rollouts else "") + shlex.join(words)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    options = parse(argv)
    try:
        options.vocab_rows = options.vocab_rows or 0
        converted = export(options.checkpoint, options)
    except (SIPError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(serve_command(converted, options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
