"""Reads a root dataclass of section dataclasses into a flat table of options."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

GENERAL = ""
"""Section of the options that stand in the root itself."""


@dataclass(frozen=True)
class Option:
    """One option: what the flag, the YAML key and the dataclass field share."""

    name: str
    section: str
    annotation: Any
    default: Any
    """The default value, or ``dataclasses.MISSING`` if the user must give one."""
    help: str
    choices: tuple[Any, ...] | None = None
    metavar: str | None = None
    also_called: tuple[str, ...] = ()
    """Names of other programs for it: not accepted, but suggested from."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def opposite_flag(self) -> str:
        """What turns a switch off: ``--no-x`` for ``--x``, and ``--x`` for ``--no-x``."""
        return "--" + self.flag[5:] if self.flag.startswith("--no-") else "--no-" + self.flag[2:]

    @property
    def is_switch(self) -> bool:
        return without_none(self.annotation) is bool


@dataclass(frozen=True)
class Section:
    """A config dataclass and its options, in the order of its fields."""

    name: str
    title: str
    config_class: type
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Schema:
    """Everything that can be configured; names of options are unique over all sections."""

    root: type
    sections: tuple[Section, ...]
    options: dict[str, Option]
    flags: dict[str, tuple[Option, bool]]
    """Flag -> (option, what a switch becomes); an opposite flag that another option has taken is not in it."""

    @property
    def other_names(self) -> dict[str, str]:
        """Name in other programs -> option, with underscores both."""
        return {name: option.name for option in self.options.values() for name in option.also_called}

    def section(self, name: str) -> Section | None:
        return next((section for section in self.sections if section.name == name), None)


def without_none(annotation: Any) -> Any:
    """``X`` for ``X | None`` and ``X``; a union of several types is returned as it stands."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation


def is_dataclass_type(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def read_schema(root: type) -> Schema:
    """Collect the options of ``root``.

    Raises:
        TypeError: two options share a name, or a field is neither an option nor a section (a defect of the caller).
    """
    hints = get_type_hints(root)
    general: list[Option] = []
    sections: list[Section] = []
    for field in dataclasses.fields(root):
        annotation = hints[field.name]
        if "help" in field.metadata:
            general.append(_option(field, annotation, GENERAL))
        elif is_dataclass_type(annotation):
            sections.append(
                Section(field.name, _title(annotation), annotation, tuple(_options(annotation, field.name)))
            )
        else:
            raise TypeError(f"{root.__name__}.{field.name} is neither made by option() nor a section dataclass")
    if general:
        sections.insert(0, Section(GENERAL, "general", root, tuple(general)))
    options: dict[str, Option] = {}
    for option in (option for section in sections for option in section.options):
        if option.name in options:
            first = options[option.name].section
            raise TypeError(f"option {option.name!r} is in section {first!r} and in section {option.section!r}")
        options[option.name] = option
    for section in sections:
        clash = options.get(section.name)
        if clash is not None and get_origin(without_none(clash.annotation)) in (dict, Mapping):
            raise TypeError(f"option {clash.name!r} takes a mapping, and so does the section of that name")
    return Schema(root, tuple(sections), options, _flags(options))


def _options(config_class: type, section: str) -> Iterator[Option]:
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        if "help" not in field.metadata:
            raise TypeError(f"{config_class.__name__}.{field.name} is not made by option()")
        yield _option(field, hints[field.name], section)


def _option(field: dataclasses.Field[Any], annotation: Any, section: str) -> Option:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    metadata = field.metadata
    return Option(
        field.name,
        section,
        annotation,
        default,
        metadata["help"],
        metadata.get("choices"),
        metadata.get("metavar"),
        metadata.get("also_called", ()),
    )


def _flags(options: dict[str, Option]) -> dict[str, tuple[Option, bool]]:
    flags = {option.flag: (option, True) for option in options.values()}
    for option in options.values():
        if option.is_switch and option.opposite_flag not in flags:
            flags[option.opposite_flag] = (option, False)
    return flags


def _title(config_class: type) -> str:
    """First sentence of the class's docstring, for the heading of its group in ``--help``."""
    # A dataclass without a docstring gets its signature as one, which is no title.
    text = (inspect.getdoc(config_class) or "").strip().split("\n\n")[0].replace("\n", " ").replace("``", "")
    return "" if text.startswith(f"{config_class.__name__}(") else text.split(". ")[0].removesuffix(".")
