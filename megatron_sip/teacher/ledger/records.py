"""What is kept of a question and its verdict, and whether the words are kept with the score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import orjson
import zstandard

from megatron_sip.teacher.interfaces import JudgeGroup, RewriteItem

_LEVEL = 3
KEY_BYTES = 16


class Asked(NamedTuple):
    """One vote of one question, as a ledger finds it again."""

    prompt: bytes
    """``prompt_key`` of the judge's prompt hash."""
    vote: int


def prompt_key(prompt_hash: str) -> bytes:
    """The first half of a hexadecimal SHA-256: 128 bits tell prompts apart."""
    return bytes.fromhex(prompt_hash)[:KEY_BYTES]


@dataclass(frozen=True)
class Context:
    """Where questions come from, for the reader."""

    sample_id: int
    step: int | None
    """Optimizer steps before it; None outside of training."""
    source: JudgeGroup | RewriteItem

    @cached_property
    def texts(self) -> bytes:
        """Prefix and candidates, compressed; made once per group, however many rounds ask about it."""
        return compressed(_texts(self.source))

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.texts).digest()[:KEY_BYTES]


@dataclass(frozen=True)
class RawPolicy:
    """``--ledger-raw``: whose words are kept. Scores always are."""

    mode: str = "all"
    share: float = 0.01
    """Of the samples, in mode ``sample``: all or nothing of a sample, always the same ones. What failed is kept too."""

    def keeps(self, sample_id: int) -> bool:
        """Whether prompts and answers about this sample are kept."""
        if self.mode != "sample":
            return self.mode == "all"
        digest = hashlib.sha256(str(sample_id).encode()).digest()
        return int.from_bytes(digest[:4], "little") < self.share * 2**32

    @property
    def keeps_failures(self) -> bool:
        return self.mode != "none"


def compressed(value: Any) -> bytes:
    """JSON in a zstd frame. Lone surrogates, which broken corpora hold, are replaced."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(_json(value))


def decompressed(frame: bytes) -> Any:
    return orjson.loads(zstandard.ZstdDecompressor().decompress(frame))


def _json(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return orjson.dumps(_clean(value))


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {key: _clean(part) for key, part in value.items()}
    return [_clean(part) for part in value] if isinstance(value, list) else value


def _texts(source: JudgeGroup | RewriteItem) -> dict[str, Any]:
    if isinstance(source, RewriteItem):
        return {"prefix": source.prefix.text, "candidates": [source.suffix.text], "kinds": ["suffix"]}
    return {
        "prefix": source.prefix.text,
        "reference": source.reference.text,
        "candidates": [candidate.text for candidate in source.candidates],
        "kinds": list(source.kinds),
    }


def is_missing(score: float | None) -> bool:
    return score is None or math.isnan(score)
