"""Says what a checkpoint holds: ``tools/inspect_checkpoint.py DIR [--step 20] [--optimizer]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.errors import SIPError
from tools._help import HelpFormatter, Parser


def main() -> None:
    """Parse the command line and print the description."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("directory", type=Path, help="what --save was, or one iter_* directory")
    parser.add_argument("--step", type=int, help="step to look at; the latest by default")
    parser.add_argument("--optimizer", action="store_true", help="list the optimizer's tensors too")
    arguments = parser.parse_args()

    from megatron_sip.checkpoint.inspection import describe  # here, so that --help needs no torch

    try:
        print(describe(arguments.directory, arguments.step, arguments.optimizer))
    except (SIPError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
