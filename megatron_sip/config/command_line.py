"""The command line: flags grouped by section, their help, and the words that the user gave."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from megatron_sip.config.convert import is_mapping, is_sequence, to_plain
from megatron_sip.config.schema import Option, Schema, without_none
from megatron_sip.config.suggest import did_you_mean
from megatron_sip.errors import ConfigurationError

_RESERVED = {"--config", "--print-config", "--help", "--version"}
_MAX_WIDTH = 120
_NEGATIVE_NUMBER = re.compile(r"(-(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf|-nan)$")
"""What argparse takes for a value in place of a flag; its own pattern (before Python 3.14) lacks exponents."""
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class CommandLine:
    """What stood on the command line, not yet converted."""

    recipes: tuple[Path, ...]
    print_config: bool
    words: dict[str, str | list[str]]
    """Option name -> its word, its words, or "true"/"false" for a switch."""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one line, no usage text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = _NEGATIVE_NUMBER

    def error(self, message: str) -> NoReturn:
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("ignored explicit argument"):
            problem = f"a switch takes no value, not {problem.removeprefix('ignored explicit argument ')}; leave it out"
        elif problem.startswith("expected one argument"):
            problem = "expected one argument after it (--flag=VALUE where the value begins with a dash)"
        raise ConfigurationError(f"{flag}: {problem}" if problem else flag)


class _Help(argparse.HelpFormatter):
    """Two columns, fitted to the terminal between 60 and 120 characters."""

    def __init__(self, prog: str) -> None:
        width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), _MAX_WIDTH) - 1
        super().__init__(prog, indent_increment=2, max_help_position=34 if width < 100 else 44, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(super(_Help, self)._fill_text(part, width, indent) for part in text.split("\n"))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        # "TEXT ..." in place of "[TEXT ...]".
        return f"{action.metavar} ..." if action.nargs == "*" else super()._format_args(action, default_metavar)


def read_command_line(
    schema: Schema, argv: Sequence[str], *, prog: str | None, description: str, version: str
) -> CommandLine:
    """Sort ``argv`` into options; ``--help`` and ``--version`` print and exit.

    Raises:
        ConfigurationError: an unknown flag, a flag without its value, or a word that belongs to no flag.
    """
    if clash := (_RESERVED | {"--base"}) & schema.flags.keys():
        raise TypeError(f"{sorted(clash)} are flags of the machinery itself; rename the option")
    parser = _build_parser(schema, prog, description, version)
    if "--help" in argv or "-h" in argv:
        _print_help(parser, schema, argv)
        raise SystemExit(0)
    namespace, extras = parser.parse_known_args(list(argv))
    _refuse_extras(extras, schema)
    given = vars(namespace)
    words = {name: given[name] for name in schema.options if name in given}
    return CommandLine(tuple(Path(path) for path in given["config"]), given["print_config"], words)


def _build_parser(schema: Schema, prog: str | None, description: str, version: str) -> _Parser:
    parser = _Parser(
        prog=prog, description=description, usage="%(prog)s [--config RECIPE.yaml ...] [--flag value ...]",
        formatter_class=_Help, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    group = parser.add_argument_group("recipes and help")
    recipe = "recipe with any of the options below as keys; its key base names a recipe to start from; may be repeated"
    effective = "print the effective configuration as a recipe, with the source of each value, and exit"
    group.add_argument("--config", action="append", default=[], metavar="YAML", help=recipe)
    group.add_argument("--print-config", action="store_true", help=effective)
    group.add_argument("--help", "-h", nargs="*", metavar="SECTION", help="print this, or only some sections, and exit")
    group.add_argument("--version", action="version", version=version, help="print the version and exit")
    for section in schema.sections:
        heading = section.name.replace("_", " ")
        group = parser.add_argument_group(" - ".join(part for part in (heading, section.title) if part))
        for option in section.options:
            _add_option(group, option, schema)
    return parser


def _add_option(group: argparse._ArgumentGroup, option: Option, schema: Schema) -> None:
    text = _help_text(option)
    if option.is_switch:
        opposite = schema.flags.get(option.opposite_flag)
        has_opposite = opposite is not None and opposite[0] is option
        both = [option.flag, option.opposite_flag] if has_opposite else [option.flag]
        # Both are shown only where the opposite is what one would type: the help is long enough.
        shown = both if option.default is True else both[:1]
        group.add_argument(*shown, dest=option.name, action=_Switch, option=option, help=text)
        for flag in both[len(shown) :]:
            group.add_argument(flag, dest=option.name, action=_Switch, option=option, help=argparse.SUPPRESS)
        return
    nargs = "*" if is_sequence(option.annotation) or is_mapping(option.annotation) else None
    # The number of words is checked with their kind, so that the message is ours.
    group.add_argument(
        option.flag, dest=option.name, nargs=nargs, metavar=_metavar(option), default=argparse.SUPPRESS, help=text
    )


class _Switch(argparse.Action):
    """``--x`` or ``--no-x``, whichever comes last."""

    def __init__(self, option_strings: Sequence[str], dest: str, option: Option, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self.option = option

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:  # fmt: skip
        setattr(namespace, self.dest, "true" if option_string == self.option.flag else "false")


def _metavar(option: Option) -> str:
    if option.metavar:
        return option.metavar
    kind = without_none(option.annotation)
    choices = _choices(option)
    if choices:
        names = "{" + ",".join(filter(None, choices)) + "}"
        return names if len(names) <= 26 else "NAME"
    if is_sequence(kind):
        items = [part for part in get_args(kind) if part is not Ellipsis]
        return " ".join(_METAVARS.get(item, "VALUE") for item in items) or "VALUE"
    return "NAME=VALUE" if is_mapping(kind) else _METAVARS.get(kind, "VALUE")


def _choices(option: Option) -> list[str]:
    kind = without_none(option.annotation)
    if option.choices:
        return [str(choice) for choice in option.choices]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    return []


def _help_text(option: Option) -> str:
    notes = []
    if _metavar(option) == "NAME" and _choices(option):
        notes.append("one of " + ", ".join(filter(None, _choices(option))))
    if option.default is dataclasses.MISSING:
        notes.append("required")
    elif option.is_switch:
        notes += ["default: on"] if option.default else []
    elif option.default not in (None, "", (), [], {}):
        notes.append(f"default: {_short(to_plain(option.default))}")
    first = option.help.split(" ", 1)[0].rstrip(":,")
    # Sections are written by many hands: all start with a capital, but for the names of values.
    is_name = first in _choices(option) or "_" in first or first[1:] != first[1:].lower()  # vLLM
    start = option.help if is_name else option.help[:1].upper() + option.help[1:]
    text = start.removesuffix(".") + (f" [{'; '.join(notes)}]" if notes else "")
    return text.replace("%", "%%")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_short(item) for item in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={_short(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_help(parser: _Parser, schema: Schema, argv: Sequence[str]) -> None:
    """Everything, or only the sections named after ``--help``."""
    position = next(index for index, word in enumerate(argv) if word in ("--help", "-h"))
    wanted = []
    for word in argv[position + 1 :]:
        if word.startswith("-"):
            break
        wanted.append(word.replace("-", "_"))
    names = [section.name for section in schema.sections if section.name]
    for word in wanted:
        if word not in names:
            near = did_you_mean(word, names)
            raise ConfigurationError(f"--help {word}: no such section{near}; there are {', '.join(names)}")
    if wanted:
        headings = {word.replace("_", " ") for word in wanted}
        parser.description = None
        parser._action_groups = [
            group for group in parser._action_groups if (group.title or "").split(" - ")[0] in headings
        ]
    parser.print_help()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_extras(extras: Sequence[str], schema: Schema) -> None:
    for word in extras:
        if word.startswith("--"):
            flag = word.split("=")[0]
            others = {_flag(name): _flag(option) for name, option in schema.other_names.items()}
            near = did_you_mean(flag.replace("_", "-"), [*schema.flags, *_RESERVED], others)
            raise ConfigurationError(f"unknown flag {flag}{near}; --help lists them all")
    if extras:
        raise ConfigurationError(f"{extras[0]!r} belongs to no flag; options start with two dashes, see --help")
