"""What a run was started with: its configuration and the versions of what it runs on, in ``run.json``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_sip.files import write_text

RUN_FILE = "run.json"

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "sentencepiece", "tiktoken", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, those that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        # Optional packages may be absent; that is all this passes over.
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def write_run_info(
    run_dir: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    chance: Mapping[str, float] | None = None,
) -> None:
    """Write ``run.json`` in one move.

    ``config`` is the whole configuration as nested dictionaries; ``extra`` are facts that the report shows beside it
    (number of parameters, of ranks, the device); ``chance``: kind of candidate -> its chosen rate if nothing mattered.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "versions": package_versions(),
        "facts": dict(extra or {}),
        "chance": dict(chance or {}),
        "config": dict(config),
    }
    write_text(folder / RUN_FILE, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def read_run_info(run_dir: Path) -> dict[str, Any]:
    """The content of ``run.json``; empty if there is none."""
    path = run_dir / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
