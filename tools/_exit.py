"""How the tools end when something is wrong: with one line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sip.errors import SIPError


@contextmanager
def one_line(tool: str) -> Iterator[None]:
    """What the user can mend is said in one line; Ctrl-C and a closed pipe (``tool | head``) are no errors of ours."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would flush what is left once more, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (SIPError, OSError) as error:
        sys.exit(f"{tool}: {error}")
    except KeyboardInterrupt:
        print(f"{tool}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def warn(text: str) -> None:
    """A line beside the output."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
