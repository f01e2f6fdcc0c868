"""What README, docs and help texts tell people to type: paths are there, flags exist, whole commands are accepted."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_sip.config.schema import read_schema
from megatron_sip.train.config import TrainConfig, load_train_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
_PATH = re.compile(r"(?<![\w/.-])((?:tools|examples|docs|megatron_sip|benchmarks|tests)/[\w./-]*[\w/])")
_CONSUMED = ("--config", "--print-config", "--help", "--version", "--dry-run", "-h")


@cache
def flags_of(tool: str) -> frozenset[str]:
    """Those that a tool's help names, and its source, which also has those of its subcommands."""
    command = [sys.executable, str(ROOT / "tools" / tool), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}).stdout
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown + (ROOT / "tools" / tool).read_text()))


def commands(text: str, script: str) -> list[list[str]]:
    """Every use of ``script`` in code that has flags: the words after it."""
    fenced = [re.sub(r"\\\n\s+", " ", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.S)]
    inline = [re.sub(r"\n\s+", " ", code) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found = []
    for block in fenced + inline:
        for line in block.splitlines():
            _, at, rest = line.partition(script)
            if at and "--" in rest:
                found.append(shlex.split(rest.split(" > ")[0].split(" | ")[0].split(" && ")[0], comments=True))
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_that_a_document_names_exists(name: str) -> None:
    named = {path for path in _PATH.findall((ROOT / name).read_text(encoding="utf-8")) if "//" not in path}
    missing = [path for path in sorted(named) if not (ROOT / path.split("::")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_that_a_document_gives_to_a_tool_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    trainer = {*read_schema(TrainConfig).flags, *_CONSUMED}
    known = {
        f"tools/{path.name}": flags_of(path.name) for path in (ROOT / "tools").glob("[a-z]*.py") if path.name in text
    }
    known |= {"pretrain_sip.py": frozenset(trainer)}
    if "tools/evaluate.py" in known:
        known["tools/evaluate.py"] |= trainer
    for script, flags in known.items():
        for words in commands(text, script):
            named = [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]
            wrong = [flag for flag in named if flag not in flags]
            assert not wrong, f"{script} {' '.join(words)}"


def test_the_trainers_commands_of_the_readme_are_accepted() -> None:
    given = [words for words in commands((ROOT / "README.md").read_text(), "pretrain_sip.py") if "--config" in words]
    assert given
    for words in given:
        config = words.index("--config") + 1
        if (ROOT / words[config]).exists():
            load_train_config([*words[:config], str(ROOT / words[config]), *words[config + 1 :]])


@pytest.mark.parametrize("source", ["README.md", "tools/evaluate.py"])
def test_the_comparison_that_is_shown_is_accepted(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import evaluate

    monkeypatch.chdir(ROOT)
    text = (ROOT / source).read_text() if source.endswith(".md") else f"```\n{evaluate.__doc__}\n```"
    given = [words for words in commands(text, "tools/evaluate.py") if "--config" in words]
    assert given
    for words in given:
        options, config = evaluate.parse(words)
        assert options.second_judge and config.data.test_data_path
