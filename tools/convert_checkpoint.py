"""Converts Llama 2 / 3 and Qwen 2 / 3 checkpoints between transformers' format and Megatron's, at any size.

    tools/convert_checkpoint.py to-megatron HF_DIR OUTPUT     then: pretrain_sip.py --config OUTPUT/recipe.yaml ...
    tools/convert_checkpoint.py to-hf CHECKPOINT OUTPUT

Goes tensor by tensor, in one process without a GPU; the checkpoint loads at any TP x PP. The output appears when it is
complete. Nothing is rounded unless --dtype says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.checkpoint.huggingface.names import CARRIED_DIRECTORY, DTYPE_NAMES, RECIPE
from megatron_sip.errors import ConfigurationError, SIPError
from tools._help import HelpFormatter

if TYPE_CHECKING:
    from megatron_sip.checkpoint.huggingface.convert import Check, Converted

README = Path(__file__).resolve().parent.parent / "README.md"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, text in (
        ("to-megatron", "model directory with config.json and safetensors", "transformers -> Megatron"),
        ("to-hf", "what --save was, what to-megatron made, or one iter_* directory", "Megatron -> transformers"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", type=Path, help=source)
        command.add_argument("output", type=Path, help="new directory")
        add_dtype_option(command)
        command.add_argument(
            "--verify", nargs="?", type=Path, const=README, metavar="FILE",
            help="compare logits on a text, by default this project's README, before the output gets its name; holds "
            "the model in memory in float32",
        )  # fmt: skip
        if name == "to-hf":
            add_export_options(command, rows="as in --like, else the tokens")
    return parser.parse_args(argv)


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """That of all conversions."""
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="keep", help="type of the weights [keep]")


def add_export_options(parser: argparse.ArgumentParser, rows: str) -> None:
    """Those of to-hf, which tools/export_policy.py has too."""
    parser.add_argument("--step", type=int, help="step to convert [the latest]")
    parser.add_argument(
        "--like", type=Path,
        help="model directory that training started from: its config.json and tokenizer go along [what to-megatron "
        f"or the run put into {CARRIED_DIRECTORY}/ beside the weights]",
    )  # fmt: skip
    parser.add_argument("--vocab-rows", type=int, help=f"rows of the embedding [{rows}]")
    parser.add_argument(
        "--untie", action="store_true",
        help="write a tied output layer as a tensor of its own: vLLM on CPU would not take new weights into a tied one",
    )  # fmt: skip
    parser.add_argument("--max-shard-gib", type=positive, default=5.0, help="size of one file [5]")


def convert(options: argparse.Namespace) -> None:
    """Runs the command and prints what to do with its output."""
    text = "" if options.verify is None else read_text(options.verify)
    if options.command == "to-megatron":
        from megatron_sip.checkpoint.huggingface.convert import recipe, to_megatron

        check = None if options.verify is None else lambda partial: compare(options.source, partial, text)
        converted = to_megatron(options.source, options.output, options.dtype, check)
        print(f"# wrote {options.output}; the same is in {RECIPE} there:\n{recipe(converted)}", end="")
        return
    check = None
    if options.verify is not None:
        check = lambda partial: compare(partial, options.source, text, options.step)  # noqa: E731
    export(options.source, options, check)
    print(f"wrote {options.output}")


def export(source: Path, options: argparse.Namespace, check: Check | None = None) -> Converted:
    """A checkpoint to transformers' format, as the options of ``add_export_options`` say. Raises SIPError."""
    from megatron_sip.checkpoint.huggingface.convert import to_hugging_face

    return to_hugging_face(
        source,
        options.output,
        step=options.step,
        like=options.like,
        dtype=options.dtype,
        vocab_rows=options.vocab_rows,
        untie=options.untie,
        max_shard_bytes=int(options.max_shard_gib * 2**30),
        check=check,
    )


def read_text(file: Path) -> str:
    """Before anything is converted. Raises ConfigurationError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--verify {file} is no text in UTF-8 ({error}): name another file.") from error


def compare(model: Path, checkpoint: Path, text: str, step: int | None = None) -> None:
    """Prints how far the logits are apart; raises if that is too far."""
    from megatron_sip.checkpoint.huggingface.verify import verify

    print(f"# {verify(model, checkpoint, text, step=step)}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; what a user can mend is printed as one line."""
    try:
        convert(parse(argv))
    except (SIPError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
