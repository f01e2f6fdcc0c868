"""Runs a claim in one process that torchrun did not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

SCRIPT = """
import importlib, json, sys
module, function = sys.argv[1].split(":")
report = getattr(importlib.import_module(module), function)(json.loads(sys.argv[2]))
print("REPORT " + repr(report))
"""


def in_a_process_without_torchrun(target: str, payload: Any) -> Any:
    """What ``function(payload)`` of ``"module:function"`` returned there."""
    import ast

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, target, json.dumps(payload)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.split("REPORT ", 1)[1])
