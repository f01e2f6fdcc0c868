"""What ranks do for test_tool.py: save two policies, and run the tool on them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sip.checkpoint import CheckpointConfig, CheckpointManager
from megatron_sip.config import load
from megatron_sip.distributed import initialize

ROOT = Path(__file__).resolve().parent.parent.parent


def tool() -> Any:
    """tools/evaluate.py as a module."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_policies(payload: dict[str, Any]) -> None:
    """Saves the initial weights of each seed to the folder that ``payload["folders"]`` gives it."""
    from megatron_sip.train.build import build_policy
    from megatron_sip.train.config import TrainConfig

    config = load(TrainConfig, payload["flags"])
    context = initialize(config.parallel, 1)
    for seed, folder in payload["folders"].items():
        policy = build_policy(config, replace(context, seed=seed))

        def state(*, chunk: Any = policy.chunks[0], metadata: Any, **flags: bool) -> dict[str, Any]:
            return {"model": chunk.sharded_state_dict(metadata=dict(metadata))}

        CheckpointManager(CheckpointConfig(save=folder), context, policy.identity).save(7, state, {})


def run_tool(argv: list[str]) -> dict[str, Any]:
    """What the tool wrote to the file that its last argument names."""
    assert tool().main(argv) == 0
    path = Path(argv[-1])
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
