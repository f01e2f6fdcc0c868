"""Writes the HTML report of a run: ``tools/report.py RUN_DIR [-o report.html]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.errors import SIPError
from megatron_sip.observability.report import write_report
from tools._help import HelpFormatter, Parser


def main() -> None:
    """Parse the command line, write the report, print where it is."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the --run-dir of a run: has metrics.jsonl")
    parser.add_argument("-o", "--output", type=Path, help="file to write; report.html in the run's folder by default")
    parser.add_argument("--title", default="", help="heading; the folder's name by default")
    arguments = parser.parse_args()
    try:
        path = write_report(arguments.run_dir, arguments.output, arguments.title)
    except (SIPError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
