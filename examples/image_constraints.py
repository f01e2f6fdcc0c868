"""Keeps pip from replacing what NVIDIA's image was built around (see Dockerfile).

``write FILE`` puts the versions of these packages into a pip constraints file; ``check FILE`` fails if one has changed.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KEPT = (
    "torch", "triton", "pytorch-triton", "transformer-engine", "apex", "flash-attn", "numpy", "nvidia-modelopt",
    "torchvision",
)  # fmt: skip


def constraints() -> str:
    """One line ``name==version`` per package of ``KEPT`` that is installed."""
    lines = []
    for name in KEPT:
        try:
            lines.append(f"{name}=={version(name)}\n")
        except PackageNotFoundError:
            continue
    return "".join(lines)


def main(action: str, path: Path) -> int:
    """``action``: "write" or "check"; returns the exit status."""
    if action == "write":
        path.write_text(constraints())
    elif path.read_text() != constraints():
        print(
            f"packages of the image have changed: it had\n{path.read_text()}now it has\n{constraints()}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
