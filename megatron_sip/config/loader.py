"""Builds a config from flags, YAML recipes and defaults, in this order of precedence."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_sip import __version__
from megatron_sip.config.command_line import read_command_line
from megatron_sip.config.convert import MismatchError, check_choices, coerce, to_plain
from megatron_sip.config.schema import GENERAL, Option, Schema, read_schema
from megatron_sip.config.suggest import did_you_mean
from megatron_sip.config.yaml_text import dump_entry, read_yaml
from megatron_sip.errors import ConfigurationError

Root = TypeVar("Root")

BASE = "base"
"""Key of a recipe that names another one, relative to it, whose values hold where it says nothing."""


DERIVED = "from other options"


@dataclass(frozen=True)
class Loaded(Generic[Root]):
    """A config and where its values came from."""

    config: Root
    sources: Mapping[str, str]
    """Option name -> "flag", the recipe's name or DERIVED; an option that is not in it has its default."""
    print_config: bool = False


def load(
    root: type[Root],
    argv: Sequence[str],
    *,
    prog: str | None = None,
    description: str = "",
    version: str = f"megatron_sip {__version__}",
) -> Root:
    """Build and validate ``root`` from ``argv`` (without the program's name).

    ``--help``, ``--version`` and ``--print-config`` print and raise ``SystemExit(0)``.

    Raises:
        ConfigurationError: anything that the user can mend, in one line.
    """
    loaded = load_with_sources(root, argv, prog=prog, description=description, version=version)
    if loaded.print_config:
        sys.stdout.write(to_yaml(loaded.config, loaded.sources))
        raise SystemExit(0)
    return loaded.config


def load_with_sources(
    root: type[Root], argv: Sequence[str], *, prog: str | None = None, description: str = "", version: str = __version__
) -> Loaded[Root]:
    """Like ``load``, but returns the sources and leaves ``--print-config`` to the caller."""
    schema = read_schema(root)
    line = read_command_line(schema, argv, prog=prog, description=description, version=version)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for path, mapping in (part for recipe in line.recipes for part in _with_bases(recipe, ())):
        for name, value in _flatten(mapping, schema, str(path)).items():
            values[name] = _convert(value, schema.options[name], f"{path}: {name}", textual=False)
            sources[name] = path.name
    for name, words in line.words.items():
        option = schema.options[name]
        values[name] = _convert(words, option, option.flag, textual=True)
        sources[name] = "flag"
    config, plain = _finish(root, values), to_options(build(root, values))
    for name, value in to_options(config).items():
        if name not in values and value != plain[name]:
            sources[name] = DERIVED
    return Loaded(config, sources, line.print_config)


def from_mapping(root: type[Root], mapping: Mapping[str, Any], source: str = "config") -> Root:
    """Build and validate ``root`` from a mapping as a YAML recipe holds it.

    Raises:
        ConfigurationError: as ``load``.
    """
    schema = read_schema(root)
    flat = _flatten(mapping, schema, source)
    return _finish(
        root,
        {n: _convert(value, schema.options[n], f"{source}: {n}", textual=False) for n, value in flat.items()},
    )


def _finish(root: type[Root], values: Mapping[str, Any]) -> Root:
    """The config of ``values``, completed where its class derives defaults from other options, and validated."""
    config = build(root, values)
    if hasattr(config, "completed"):
        config = config.completed(frozenset(values))
    validate(config)
    return config


def build(root: type[Root], values: Mapping[str, Any]) -> Root:
    """``root`` from converted values by option name; the rest keeps its defaults. Not yet validated.

    Raises:
        ConfigurationError: an option without a default is missing.
    """
    schema = read_schema(root)
    for option in schema.options.values():
        if option.default is dataclasses.MISSING and option.name not in values:
            raise ConfigurationError(f"{option.flag} is required: {option.help}")
    fields: dict[str, Any] = {}
    for section in schema.sections:
        chosen = {option.name: values[option.name] for option in section.options if option.name in values}
        if section.name == GENERAL:
            fields.update(chosen)
        else:
            fields[section.name] = section.config_class(**chosen)
    return root(**fields)


def validate(config: Any) -> None:
    """Call ``validate()`` of each section that has one, then the root's own.

    Raises:
        ConfigurationError: whatever they find.
    """
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section) and hasattr(section, "validate"):
            section.validate()
    if hasattr(config, "validate"):
        config.validate()


def to_options(config: Any) -> dict[str, Any]:
    """Option name -> value, of all sections."""
    return {
        option.name: getattr(config if section.name == GENERAL else getattr(config, section.name), option.name)
        for section in read_schema(type(config)).sections
        for option in section.options
    }


def to_yaml(config: Any, sources: Mapping[str, str] | None = None) -> str:
    """``config`` as a recipe that gives it back; a comment names the source of what is not a default.

    What was derived from other options stands in comments: set, it would no longer follow them.
    """
    schema = read_schema(type(config))
    lines: list[str] = []
    for section in schema.sections:
        holder = config if section.name == GENERAL else getattr(config, section.name)
        indent = "" if section.name == GENERAL else "  "
        if section.name != GENERAL and section.options:
            lines.append(f"{section.name}:")
        for option in section.options:
            entry = dump_entry(option.name, to_plain(getattr(holder, option.name)))
            source = (sources or {}).get(option.name)
            if source == DERIVED:
                entry = "\n".join(f"# {line}" for line in entry.split("\n"))
            first, *rest = entry.split("\n")
            lines.append(f"{indent}{first}" + (f"  # {source}" if source else ""))
            lines += [f"{indent}{line}" for line in rest]
    return "\n".join(lines) + "\n"


def save_yaml(config: Any, path: Path) -> None:
    """Write the effective config where the run keeps its results."""
    path.write_text(to_yaml(config), encoding="utf-8")


def _with_bases(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """The recipe in ``path`` after the one that its key ``base`` names, and that one's base before it."""
    if path in above:
        raise ConfigurationError(f"{path}: it is its own base, by way of {' and '.join(map(str, above))}")
    mapping = read_yaml(path)
    base = mapping.pop(BASE, None)
    if base is not None and not isinstance(base, str):
        raise ConfigurationError(f"{path}: {BASE} must be the name of a recipe beside this one, not {base!r}")
    if base is not None:
        yield from _with_bases(path.parent / base, (*above, path))
    yield path, mapping


def _flatten(mapping: Mapping[Any, Any], schema: Schema, source: str) -> dict[str, Any]:
    """Sections and flat keys -> option name -> raw value."""
    flat: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if name in flat:
            raise ConfigurationError(f"{source}: {name} is set twice, in its section and outside; keep one")
        flat[name] = value

    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        section = schema.section(name) if name else None
        # A section may share its name with one of its options (curriculum, objective): a mapping means the section.
        if section is not None and (isinstance(value, Mapping) or value is None):
            for inner_key, inner_value in (value or {}).items():
                inner = str(inner_key).replace("-", "_")
                if inner not in {option.name for option in section.options}:
                    raise ConfigurationError(_unknown_key(inner, schema, source, section.name))
                put(inner, inner_value)
        elif name in schema.options:
            put(name, value)
        else:
            raise ConfigurationError(_unknown_key(name, schema, source, None))
    return flat


def _unknown_key(name: str, schema: Schema, source: str, section: str | None) -> str:
    if section is not None and name in schema.options:
        return f"{source}: {name} belongs to section {schema.options[name].section!r}, not to {section!r}"
    if section is None and schema.section(name) is not None:
        return f"{source}: section {name!r} must be a mapping of options"
    sections = [s.name for s in schema.sections if s.name]
    near = did_you_mean(name, [*schema.options, *([] if section else sections)], schema.other_names)
    where = f" in section {section!r}" if section else ""
    return f"{source}: unknown key {name}{where}{near}; --help lists them all"


def _convert(value: Any, option: Option, label: str, *, textual: bool) -> Any:
    if value == "" and option.default != "":
        # What an unset variable of a launch script leaves; as a path it would mean the working directory.
        raise ConfigurationError(f"{label} is empty: give a value, or leave it out")
    try:
        return check_choices(coerce(value, option.annotation, textual=textual), option.choices)
    except MismatchError as error:
        raise ConfigurationError(f"{label} must be {error.expected}, not {error.value!r}") from None
