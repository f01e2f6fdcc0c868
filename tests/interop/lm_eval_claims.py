"""What the ranks of a launch do with lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any


def scores(payload: dict[str, Any]) -> dict[str, Any]:
    """tools/run_lm_eval.py with these flags; rank 0 returns what it wrote."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = f"{payload['cache']}/{os.environ['RANK']}"
    from tools.run_lm_eval import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(payload["flags"])
    output = Path(payload["flags"][payload["flags"].index("--output") + 1])
    results = json.loads(output.read_text()) if os.environ["RANK"] == "0" else None
    return {"status": status, "printed": printed.getvalue(), "results": results}
