"""Prose out of Python sources: docstrings, and the long strings of documentation tables. Nothing is imported or run."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections import Counter
from pathlib import Path

_MIN_DOCSTRING = 60
"""Characters: shorter ones ("Return the name.") say too little to be worth their place."""
_RULE = re.compile(r"^\W*$")
_PROMPT = re.compile(r"^\s*(>>>|\.\.\.|In \[\d+\]:)")
_SHORT_LINE = 20


def docstring_groups(path: Path) -> list[str]:
    """The docstrings of a file, one text per top-level class, function or documentation entry, the module's own first.

    Raises ``SyntaxError`` or ``ValueError`` if the file is not Python 3 in UTF-8.
    """
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the sources of others
        tree = ast.parse(source)
    groups = [_texts_of(tree, nested=False)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            groups.append(_texts_of(node, nested=True))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            groups.append(_documentation_call(node.value))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and path.name == "topics.py":
            groups += [_cleaned_strings([value]) for value in node.value.values]
    return [text for text in ("\n\n".join(group) for group in groups) if text]


def _texts_of(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, nested: bool) -> list[str]:
    texts = []
    found = ast.get_docstring(node)
    if found and len(found) >= _MIN_DOCSTRING:
        texts.append(found)
    if nested:
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts += _texts_of(child, nested=True)
    return texts


def _documentation_call(call: ast.Call) -> list[str]:
    """Strings of ``add_docstr(torch.abs, r'''...''')`` and the like, which document functions written in C."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return _cleaned_strings(call.args) if "doc" in name.lower() else []


def _cleaned_strings(nodes: list[ast.expr]) -> list[str]:
    strings = [
        node.value
        for argument in nodes
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [inspect.cleandoc(text) for text in strings if len(text) >= _MIN_DOCSTRING]


def without_prompts(text: str) -> str:
    """Text without interpreter sessions (a ``>>>`` line and what follows to the next blank line) and without rules."""
    kept = []
    in_session = False
    for line in text.splitlines():
        if _PROMPT.match(line):
            in_session = True
        elif not line.strip():
            in_session = False
        if in_session or (line.strip() and _RULE.match(line)):
            continue
        kept.append(line.rstrip())
    return "\n".join(kept)


class Deduplicator:
    """Removes paragraphs that were there before, and lines beyond their first few, over a whole corpus.

    What repeats across documents is boilerplate, which an n-gram judge would reward.
    """

    def __init__(self, max_line_repeats: int = 2, max_short_line_repeats: int = 50) -> None:
        self._paragraphs: set[int] = set()
        self._lines: Counter[str] = Counter()
        self._max_repeats = max_line_repeats
        self._max_short_repeats = max_short_line_repeats
        self.num_removed_chars = 0

    def __call__(self, text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            lines = [line for line in paragraph.splitlines() if line.strip()]
            normal = " ".join(" ".join(lines).lower().split())
            # Heading-like paragraphs come back by right; the limit on lines holds them down.
            if not normal or (len(normal) >= _SHORT_LINE and hash(normal) in self._paragraphs):
                continue
            self._paragraphs.add(hash(normal))
            lines = [line for line in lines if self._is_rare(line)]
            if lines:
                kept.append("\n".join(lines))
        result = "\n\n".join(kept)
        self.num_removed_chars += max(0, len(text) - len(result))
        return result

    def _is_rare(self, line: str) -> bool:
        key = " ".join(line.lower().split())
        self._lines[key] += 1
        limit = self._max_repeats if len(key) >= _SHORT_LINE else self._max_short_repeats
        return self._lines[key] <= limit
