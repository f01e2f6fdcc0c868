"""Prompt templates: plain text files with ``{{name}}`` where a text goes in.

A file is one user message. Lines ``=== system``, ``=== user`` and ``=== assistant`` cut it into messages; one of
the assistant at the end is what its answer must begin with. Texts are put in as they are and not searched for names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.interfaces import Question

_NAME = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_HEADING = re.compile(r"^=== *(system|user|assistant) *$\n?", re.MULTILINE)
_PACKAGE = "megatron_sip.teacher"

PLACEHOLDERS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    # File stem up to the variant -> (names it must hold, names it may hold).
    "quality": (frozenset({"option_1", "option_2"}), frozenset({"prefix"})),
    "coherence": (frozenset({"option_1", "option_2"}), frozenset({"prefix"})),
    "safety": (frozenset({"text"}), frozenset()),
    "factuality": (frozenset({"text"}), frozenset({"prefix", "reference"})),
    "corruption": (frozenset({"suffix"}), frozenset({"prefix"})),
    "rewriter": (frozenset({"suffix"}), frozenset({"prefix", "lead_in"})),
}


@dataclass(frozen=True)
class Template:
    """Messages as (role, text with names)."""

    messages: tuple[tuple[str, str], ...]

    def render(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """Chat messages; ``values`` may hold more names than the template."""
        return [
            {"role": role, "content": _NAME.sub(lambda match: values[match.group(1)], text)}
            for role, text in self.messages
        ]


def load_template(name: str, directory: str = "") -> Template:
    """``NAME.txt`` from ``directory`` if it is there, else ours.

    Raises ConfigurationError for a directory that is not there, for a file that cannot be read, lacks a name it needs,
    or holds an unknown one.
    """
    if directory and not Path(directory).is_dir():
        raise ConfigurationError(f"--judge-prompts: no directory {directory}; give one, or none for our prompts")
    path = Path(directory) / f"{name}.txt" if directory else None
    try:
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            text = (resources.files(_PACKAGE) / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"judge-prompts: {name}.txt cannot be read ({error}): give a UTF-8 text file"
        ) from error
    needed, optional = PLACEHOLDERS[name.partition("_")[0]]
    found = set(_NAME.findall(text))
    if not needed <= found or not found <= needed | optional:
        raise ConfigurationError(
            f"judge-prompts: {name}.txt has {_list(found)}: it must have {_list(needed)} and may have {_list(optional)}"
        )
    return Template(tuple(_messages(text)))


def question_values(question: Question) -> dict[str, str]:
    """What templates of judges may hold."""
    group, options = question.group, question.options
    texts = [group.candidates[option].text for option in options]
    values = {"prefix": group.prefix.text, "reference": group.reference.text, "text": texts[0]}
    return values | {f"option_{number}": text for number, text in enumerate(texts, 1)}


def prompt_digest(messages: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of rendered messages."""
    digest = hashlib.sha256()
    for message in messages:
        for part in (message["role"], message["content"]):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _messages(text: str) -> list[tuple[str, str]]:
    parts = _HEADING.split(text)
    found = [("user", parts[0])] if parts[0].strip() else []
    found += zip(parts[1::2], parts[2::2], strict=True)
    return [(role, content.strip("\n")) for role, content in found]


def _list(names: set[str] | frozenset[str]) -> str:
    return ", ".join(f"{{{{{name}}}}}" for name in sorted(names)) or "no name"
