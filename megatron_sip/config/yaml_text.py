"""YAML as people write it: the scalars of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, where ``5e-4`` is a text, ``on`` is true, ``12:30`` is 750 and ``2026-11-21`` is a date.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_sip.errors import ConfigurationError

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what ``_Loader`` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1 go; the dumper keeps them, to quote for other readers too
for _class in (_Loader, _Dumper):
    for _name, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    try:
        return int(text, 16) if text.startswith("0x") else int(text)  # 010 is ten, not eight
    except ValueError:  # more digits than Python reads
        problem = f"a number of {len(text)} digits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, source: str) -> Any:
    """The value in ``text``.

    Raises:
        ConfigurationError: it is not YAML; ``source`` says where it stood.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader, so nothing is executed
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigurationError(f"{source}{place}: not valid YAML: {problem}") from None


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigurationError: the file cannot be read or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--config {path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"--config {path}: not a text file in UTF-8") from None
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: must be a mapping of options, not {type(value).__name__}")
    return value


def dump_entry(name: str, value: Any) -> str:
    """``name: value`` as YAML text without the last line break; lists of scalars stay on one line."""
    is_flat_list = isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
    style = None if is_flat_list else False
    return str(yaml.dump({name: value}, Dumper=_Dumper, default_flow_style=style, sort_keys=False, width=1000)).rstrip(
        "\n"
    )
