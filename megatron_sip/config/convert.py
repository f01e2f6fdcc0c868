"""Turns words of the command line and values of YAML into what a field's annotation asks for, and back."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import sys
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_sip.config.schema import is_dataclass_type, without_none
from megatron_sip.config.suggest import did_you_mean
from megatron_sip.config.yaml_text import parse_yaml

_SEQUENCES = (list, tuple, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")


class MismatchError(Exception):
    """A value that does not fit; the loader adds which option it was for and where it came from."""

    def __init__(self, expected: str, value: Any) -> None:
        self.expected = expected
        self.value = value
        super().__init__(f"{expected}, not {value!r}")


def is_sequence(annotation: Any) -> bool:
    kind = without_none(annotation)
    return (get_origin(kind) or kind) in _SEQUENCES


def is_mapping(annotation: Any) -> bool:
    kind = without_none(annotation)
    return (get_origin(kind) or kind) in _MAPPINGS


def describe(annotation: Any) -> str:
    """What a value must be, in words: "a whole number", "a list of numbers"."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        parts = [describe(part) for part in arguments if part is not type(None)]
        return " or ".join([*parts, "none"] if type(None) in arguments else parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    if (origin or annotation) in _SEQUENCES:
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)} values"
        return f"a list, each item {describe(arguments[0])}" if arguments else "a list"
    if (origin or annotation) in _MAPPINGS:
        return f"a mapping to {describe(arguments[1])}" if arguments else "a mapping"
    if is_dataclass_type(annotation):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(annotation))
    return str(annotation)


def coerce(value: Any, annotation: Any, *, textual: bool) -> Any:
    """Convert ``value``, from YAML or (``textual``) as words of the command line, to ``annotation``.

    Raises:
        MismatchError: it does not fit.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, annotation, textual)
    if origin is Literal:
        return _pick(value, {argument: argument for argument in arguments}, annotation, textual)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _pick(value, {member.value: member for member in annotation}, annotation, textual)
    if (origin or annotation) in _SEQUENCES:
        return _coerce_sequence(value, annotation, textual)
    if (origin or annotation) in _MAPPINGS:
        return _coerce_mapping(value, annotation, textual)
    if is_dataclass_type(annotation):
        return _coerce_dataclass(value, annotation, textual)
    return _coerce_scalar(value, annotation, textual)


def _coerce_scalar(value: Any, annotation: Any, textual: bool) -> Any:
    if annotation is Any:
        return parse_yaml(value, "the command line") if textual else value
    if annotation in (str, Path) and isinstance(value, str):
        return annotation(value)
    if annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
    if annotation in (int, float) and not isinstance(value, bool):
        number = _number(value) if textual else value
        if isinstance(number, (int, float)):
            return _float(number, value) if annotation is float else _int(number, value)
    raise MismatchError(describe(annotation), value)


def _float(number: int | float, value: Any) -> float:
    # No option has a use for NaN, which every comparison of a validation lets pass, nor for infinity.
    if (isinstance(number, int) and abs(number) > sys.float_info.max) or not math.isfinite(number):
        raise MismatchError("a finite number", value)
    return float(number)


def _int(number: int | float, value: Any) -> int:
    # 1e6 is how people write a million; 1.5 is a mistake.
    if isinstance(number, float) and not number.is_integer():
        raise MismatchError(describe(int), value)
    if abs(number) >= 2**63:
        raise MismatchError("a whole number of at most 63 bits", value)
    return int(number)


def _number(word: Any) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(word)
        except (TypeError, ValueError):
            continue
    return None


def _coerce_union(value: Any, annotation: Any, textual: bool) -> Any:
    parts = get_args(annotation)
    if type(None) in parts and (value is None or (textual and isinstance(value, str) and value.lower() == "none")):
        return None
    candidates = [part for part in parts if part is not type(None)]
    # A single type keeps its own, more telling message (an unknown key of a mapping, an item of a list).
    if len(candidates) == 1:
        return coerce(value, candidates[0], textual=textual)
    for part in candidates:
        try:
            return coerce(value, part, textual=textual)
        except MismatchError:
            continue
    raise MismatchError(describe(annotation), value)


def _pick(value: Any, members: Mapping[Any, Any], annotation: Any, textual: bool) -> Any:
    for key, member in members.items():
        if (str(key) == value) if textual else (key == value and type(key) is type(value)):
            return member
    raise MismatchError(describe(annotation), value)


def _coerce_sequence(value: Any, annotation: Any, textual: bool) -> Any:
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    takes_mappings = any(is_dataclass_type(kind) or is_mapping(kind) for kind in arguments)
    if value is None or (isinstance(value, Mapping) and not takes_mappings):
        raise MismatchError(describe(annotation), value)
    # One item needs no brackets: `data_path: corpus` is `data_path: [corpus]`.
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if textual and not takes_mappings and not {str, Path, Any}.intersection(arguments):
        # --adam-betas 0.9,0.95 and --adam-betas 0.9 0.95 alike; only texts may hold commas of their own.
        items = [word for item in items for word in item.split(",")]
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(items) != len(arguments):
            raise MismatchError(describe(annotation), value)
        kinds = list(arguments)
    else:
        kinds = [arguments[0] if arguments else Any] * len(items)
    converted = [coerce(item, kind, textual=textual) for item, kind in zip(items, kinds, strict=True)]
    return converted if origin is list else tuple(converted)


def _coerce_mapping(value: Any, annotation: Any, textual: bool) -> dict[Any, Any]:
    key_kind, value_kind = get_args(annotation) or (Any, Any)
    if textual and isinstance(value, str):
        # An item of a list of mappings: --phases "{name: warm-up, ntp: 1}"
        value, textual = parse_yaml(value, "the command line"), False
    elif textual:
        words = value
        pairs = [word.partition("=") for word in words]
        broken = next((word for word, pair in zip(words, pairs, strict=True) if not pair[1]), None)
        if broken is not None:
            raise MismatchError("words of the form name=value", broken)
        value = {name: text for name, _, text in pairs}
    if not isinstance(value, Mapping):
        raise MismatchError(describe(annotation), value)
    return {
        coerce(name, key_kind, textual=textual): coerce(item, value_kind, textual=textual)
        for name, item in value.items()
    }


def _coerce_dataclass(value: Any, annotation: Any, textual: bool) -> Any:
    if textual:
        value = parse_yaml(value, "the command line")
    if not isinstance(value, Mapping):
        raise MismatchError(describe(annotation), value)
    hints = get_type_hints(annotation)
    fields = {field.name: field for field in dataclasses.fields(annotation) if field.init}
    converted = {}
    for key, item in value.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise MismatchError(f"{describe(annotation)}{did_you_mean(name, fields)}", key)
        try:
            converted[name] = check_choices(
                coerce(item, hints[name], textual=False), fields[name].metadata.get("choices")
            )
        except MismatchError as error:
            raise MismatchError(f"{describe(annotation)}, its {name} {error.expected}", error.value) from None
    required = (name for name, field in fields.items() if _is_required(field) and name not in converted)
    if (missing := next(required, None)) is not None:
        raise MismatchError(f"{describe(annotation)} ({missing} is missing)", value)
    return annotation(**converted)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def check_choices(value: Any, choices: tuple[Any, ...] | None) -> Any:
    """Return ``value``, each of whose items must be among ``choices`` if there are any."""
    if choices is None or value is None:
        return value
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if item not in choices:
            near = did_you_mean(str(item), [str(choice) for choice in choices])
            raise MismatchError("one of " + ", ".join(map(str, choices)) + near, item)
    return value


def to_plain(value: Any) -> Any:
    """A value in the types of YAML, such that ``coerce`` gives it back."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {to_plain(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value
