"""Which documents stay: rules that each say what they dropped, applied in a fixed order, the cheap ones first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sip.data.quality import GOPHER_RULES, unsafe_subset_rules
from megatron_sip.data.records import DUPLICATE, SIGNALS, Record, lookup, unpacked
from megatron_sip.data.splits import document_key, parse_shares, split_of, text_hash
from megatron_sip.errors import ConfigurationError, DataError

Rule = Callable[[Record], bool]
"""True if the document stays. Raises ``ValueError`` if the record lacks what the rule needs: a broken line."""
UNSAFE_READINGS = ("off", "code", "text")


@dataclass(frozen=True)
class FilterConfig:
    """What to keep; the empty configuration keeps everything."""

    languages: tuple[str, ...] = ()
    language_field: str = "language"
    buckets: tuple[str, ...] = ()
    bucket_field: str = "bucket"
    sets: tuple[str, ...] = ()
    """SlimPajama's sets, with or without ``RedPajama`` in front."""
    set_field: str = "meta.redpajama_set_name"
    drop_duplicates: bool = False
    """Leave out what RedPajama-V2's duplicates files name."""
    unsafe_subset: str = "off"
    """The paper's unsafe subset (Figure 12) from RedPajama-V2's quality signals. ``code``: curse words and a blocklist
    category, as its code has it; ``text``: either, as its text has it."""
    gopher: bool = False
    """Gopher's quality rules, computed from the text."""
    predicate: str | None = None
    """``module:function`` of the user: called with the fields of a line, true if the document stays."""
    splits: str | None = None
    """``name:share,...``: cut the corpus by a stable hash, and keep the documents of ``split``."""
    split: str | None = None
    split_key: str = "text"
    """``text`` (case and white space do not count) or a field's name or dotted path."""
    exclude: str | None = None
    """File of text hashes to leave out, one per line, as tools/split_corpus.py writes them."""

    def validate(self) -> None:
        """Raise ``ConfigurationError`` for options that cannot work."""
        if self.unsafe_subset not in UNSAFE_READINGS:
            raise ConfigurationError(f"--unsafe-subset {self.unsafe_subset}: choose {', '.join(UNSAFE_READINGS)}")
        if (self.splits is None) != (self.split is None):
            raise ConfigurationError("--splits name:share,... and --split name go together")
        if self.splits is not None and self.split not in parse_shares(self.splits):
            raise ConfigurationError(f"--split {self.split}: not one of --splits {self.splits}")
        if self.predicate is not None and self.predicate.count(":") != 1:
            raise ConfigurationError(f"--predicate {self.predicate}: write module:function")

    @property
    def fields(self) -> tuple[str, ...] | None:
        """Fields that the rules read, or None if that cannot be said (a predicate may read any)."""
        if self.predicate is not None:
            return None
        found = [self.language_field] if self.languages else []
        found += [self.bucket_field] if self.buckets else []
        found += [self.set_field] if self.sets else []
        found += [SIGNALS] if self.unsafe_subset != "off" else []
        found += [self.split_key] if self.split is not None and self.split_key != "text" else []
        return tuple(found)


@dataclass
class FilterCounts:
    """How many documents each rule dropped; one is counted with the first rule that it fails."""

    dropped: dict[str, int] = field(default_factory=dict)


class DocumentFilter:
    """The rules of a configuration in order."""

    def __init__(self, config: FilterConfig) -> None:
        config.validate()
        self.rules: list[tuple[str, Rule]] = []
        if config.languages:
            self._one_of("language", config.language_field, config.languages)
        if config.buckets:
            self._one_of("bucket", config.bucket_field, config.buckets)
        if config.sets:
            self._one_of("set", config.set_field, [name.removeprefix("RedPajama") for name in config.sets])
        if config.drop_duplicates:
            self.rules.append(("duplicate", lambda record: not record.fields.get(DUPLICATE, False)))
        if config.splits is not None and config.split is not None:
            self.rules.append(("split", _split_rule(parse_shares(config.splits), config.split, config.split_key)))
        if config.exclude is not None:
            excluded = read_hashes(Path(config.exclude))
            self.rules.append(("excluded", lambda record: text_hash(record.texts[0]) not in excluded))
        if config.unsafe_subset != "off":
            for name, rule in unsafe_subset_rules(config.unsafe_subset):
                self.rules.append((f"unsafe subset: {name}", _on_signals(rule)))
        if config.gopher:
            for name, text_rule in GOPHER_RULES:
                self.rules.append((f"gopher: {name}", _on_text(text_rule)))
        if config.predicate is not None:
            self.rules.append((f"predicate {config.predicate}", _load_predicate(config.predicate)))

    def __call__(self, record: Record) -> str | None:
        """Name of the first rule that drops the document, None if it stays. Raises ``ValueError`` for a broken line."""
        for name, rule in self.rules:
            if not rule(record):
                return name
        return None

    def _one_of(self, name: str, path: str, wanted: Sequence[str]) -> None:
        allowed = frozenset(wanted)

        def rule(record: Record) -> bool:
            value = lookup(record.fields, path)
            return (value.removeprefix("RedPajama") if isinstance(value, str) else value) in allowed

        self.rules.append((name, rule))


def read_hashes(path: Path) -> frozenset[str]:
    """Text hashes of a file, one per line. Raises ``DataError``."""
    if not path.is_file():
        raise DataError(f"--exclude {path}: no such file; tools/split_corpus.py prove --write-exclusions makes one")
    hashes = path.read_text(encoding="ascii").split()
    wrong = [value for value in hashes if len(value) != 32 or not set(value) <= set("0123456789abcdef")]
    if wrong:
        raise DataError(f"--exclude {path}: {wrong[0]!r} is not a text hash (32 hexadecimal digits)")
    return frozenset(hashes)


def _split_rule(shares: Mapping[str, float], split: str, key: str) -> Rule:
    return lambda record: split_of(document_key(record, key), shares) == split


def _on_signals(rule: Callable[[Mapping[str, Any]], bool]) -> Rule:
    def on_record(record: Record) -> bool:
        if SIGNALS not in record.fields:
            raise ValueError(
                f"no field {SIGNALS!r}, which --unsafe-subset needs; read RedPajama-V2 by --format redpajama-v2, "
                "without the tail bucket (--buckets head middle)"
            )
        return rule(unpacked(record.fields[SIGNALS]))

    return on_record


def _on_text(rule: Callable[[str], bool]) -> Rule:
    return lambda record: rule(record.texts[0])


def _load_predicate(name: str) -> Rule:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"--predicate {name}: {error}; run in its folder, or put that on PYTHONPATH"
        ) from error

    def rule(record: Record) -> bool:
        try:
            return bool(function(record.fields))
        except Exception as error:  # whatever a user's function raises belongs to the line it was called with
            raise ValueError(f"--predicate {name} raised {type(error).__name__}: {error}") from error

    return rule
