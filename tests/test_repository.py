"""Rules of the repository that a reviewer would otherwise have to look for (docs/design/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_BYTES = 1_000_000

LONG_FILES: frozenset[str] = frozenset()
LONG_FUNCTIONS: frozenset[str] = frozenset()


def files(*suffixes: str) -> list[Path]:
    """Files of the checkout that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def package_modules() -> Iterator[tuple[str, ast.Module]]:
    for path in files(".py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("megatron_sip/"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {f"{entry.name.lower()};{entry.marker or ''}": entry for entry in parsed}


def test_python_files_stay_short() -> None:
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in files(".py")}
    long = {name: count for name, count in lines.items() if count >= MAX_LINES and name not in LONG_FILES}
    assert not long, f"split these files: {long}"


def test_functions_fit_a_screen() -> None:
    long = [
        f"{name}:{node.lineno} {node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for name, tree in package_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
        and f"{name}:{node.name}" not in LONG_FUNCTIONS
    ]
    assert not long, f"split these functions: {long}"


def test_only_the_device_layer_asks_for_cuda() -> None:
    found = []
    for name, tree in package_modules():
        if name.startswith("megatron_sip/distributed/"):
            continue
        for node in ast.walk(tree):
            attribute = isinstance(node, ast.Attribute) and node.attr == "cuda" and _is_torch(node.value)
            imported = isinstance(node, ast.Import) and any(n.name.startswith("torch.cuda") for n in node.names)
            taken = isinstance(node, ast.ImportFrom) and (
                (node.module or "").startswith("torch.cuda")
                or (node.module == "torch" and any(n.name == "cuda" for n in node.names))
            )
            if attribute or imported or taken:
                found.append(f"{name}:{node.lineno}")
    assert not found, f"torch.cuda belongs into megatron_sip/distributed: {found}"


def _is_torch(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "torch"


def test_nothing_is_left_undone() -> None:
    # Spelled in halves, so that this file does not find itself.
    marks = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|NotImplemented" + "Error")
    found = [path.name for path in files(".py", ".sh", ".yaml") if marks.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_no_path_of_somebodys_machine_is_in_the_repository() -> None:
    paths = re.compile("/(?:wo" + r"rk|ro" + r"ot|home/\w+|Users/\w+)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files(".py", ".sh", ".yaml", ".yml", ".toml", ".txt", ".md", ".json", ".slurm", "")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if paths.search(line)
    ]
    assert not found, f"write these without the path of one machine: {found}"


def test_no_large_file_is_in_the_repository() -> None:
    assert not [path.name for path in files() if path.stat().st_size >= MAX_BYTES]


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = requirements("requirements.txt")
    for python in ("3.11", "3.12"):
        environment = {"python_version": python}
        pinned = {
            pin.name.lower(): str(pin.specifier).removeprefix("==")
            for pin in pins.values()
            if pin.marker is None or pin.marker.evaluate(environment)
        }
        for text in project["dependencies"]:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate(environment):
                assert wanted.specifier.contains(pinned[wanted.name.lower()]), f"{text} on Python {python}"


def test_every_pin_is_exact() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for entry in requirements(name).values():
            assert re.fullmatch(r"==[\w.]+", str(entry.specifier)), f"{name}: {entry}"


def test_requirements_on_nvidias_image_leave_its_builds_alone() -> None:
    names = {key.split(";")[0].replace("_", "-") for key in requirements("requirements-cuda.txt")}
    assert "megatron-core" in names
    assert not names & {"torch", "torchvision", "triton", "transformer-engine", "apex", "flash-attn", "numpy"}


def test_every_package_has_the_options_of_its_own_only() -> None:
    """Flags are declared by ``option`` in a config.py, never by argparse inside the package."""
    users = [
        name
        for name, tree in package_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and any(alias.name == "argparse" for alias in node.names)
    ]
    assert users == ["megatron_sip/config/command_line.py"]
