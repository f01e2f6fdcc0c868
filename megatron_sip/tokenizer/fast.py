"""Batches through the gigatoken library: the ids of the tokenizer's own library, many times as fast, and compared."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sip.errors import ConfigurationError
from megatron_sip.tokenizer.base import TokenArray, Tokenizer, joined, library_version

_PROBES = (
    "The quick brown fox, don't you think?  It's 12345 dollars.\n\n\tdef f(x):\r\n    return x\n/",
    "naïve café ÀÉÎ a\u0301\u0301 ǅ ʰ 東京 日本語テキスト \U0001f600 x\u00a0y\u3000z\u2028 \x00 \ufeffab",
    "   \n \n  ",
    "",
)
_PROBE_CHARS = 1000
_SCHEMES = {"v2": "nemotron"}
"""Name of a tiktoken pattern in gigatoken; it knows none that equals v1."""


class EngineUnavailable(ConfigurationError):
    """gigatoken is not there or cannot stand in for this tokenizer: its ids were never used."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"--tokenizer-engine gigatoken: {self.reason}; give --tokenizer-engine library or auto"


class FastTokenizer(Tokenizer):
    """Encodes batches with gigatoken and everything else with the tokenizer's own library.

    The two are compared on texts that are known to be difficult when this is built (``EngineUnavailable``), then on the
    beginning of one text of every batch (``ConfigurationError``): a vocabulary must not change its meaning unseen.
    """

    def __init__(self, library: Tokenizer, engine: Any, first_id: int, probes: Sequence[str] = ()) -> None:
        """``engine``: gigatoken's tokenizer without control tokens. ``first_id`` is added to the ids that it gives.

        ``probes``: further texts to compare on, such as the names of control tokens.
        """
        self._library = library
        self._engine = engine
        self._first_id = np.uint32(first_id)
        self.vocab_size, self.eod_id, self.fingerprint = library.vocab_size, library.eod_id, library.fingerprint
        self.engine = library_version("gigatoken")
        # What the library puts before every text, such as a begin token.
        self._before = library.encode("")
        self._num_batches = 0
        if (text := self._differing([*_PROBES, *probes])) is not None:
            raise EngineUnavailable(f"gives other ids than the tokenizer's own library for {text[:60]!r}")

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text)

    def encode_packed(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        if texts:
            probe = texts[self._num_batches % len(texts)][:_PROBE_CHARS]
            if self._differing([probe]) is not None:
                raise ConfigurationError(
                    "--tokenizer-engine gigatoken or auto: gigatoken gives other ids than the tokenizer's own library "
                    f"for {probe[:60]!r}; give --tokenizer-engine library"
                )
            self._num_batches += 1
        return self._encode(texts)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        tokens, lengths = self.encode_packed(texts)
        return np.split(tokens, np.cumsum(lengths)[:-1]) if texts else []

    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        return self._library.decode(tokens)

    def encode_continuation(self, text: str) -> list[int]:
        return self._library.encode_continuation(text)

    def _encode(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        # One thread: the callers that have many texts run one process per core.
        layout = self._engine.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]] + self._first_id
        return joined(tokens, np.diff(offsets), self._before, ())

    def _differing(self, texts: Sequence[str]) -> str | None:
        """The first text that the two encode differently."""
        tokens, lengths = self._encode(texts)
        for text, found in zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
            if self._library.encode(text) != found.tolist():
                return text
        return None


def _gigatoken() -> Any:
    try:
        import gigatoken
    except ImportError as error:
        raise EngineUnavailable("gigatoken is not installed (pip install gigatoken)") from error
    return gigatoken


def _built(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (ValueError, TypeError, RuntimeError) as error:
        raise EngineUnavailable(f"cannot build this tokenizer ({error})") from error


def fast_tiktoken(library: Tokenizer, pieces: Sequence[bytes], first_id: int, pattern: str) -> FastTokenizer:
    """For tiktoken ranks. ``first_id``: id of the first piece. Raises ``EngineUnavailable``."""
    gigatoken = _gigatoken()
    if pattern not in _SCHEMES:
        raise EngineUnavailable(f"does not know --tiktoken-pattern {pattern}")
    ranks = "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as file:
        file.write(ranks)
        file.flush()
        engine = _built(lambda: gigatoken.Tokenizer.from_tiktoken(file.name, _SCHEMES[pattern], {}))
    return FastTokenizer(library, engine, first_id, ("a </s> b",))


def fast_hugging_face(library: Tokenizer, definition: str) -> FastTokenizer:
    """For the text of a ``tokenizer.json``. Raises ``EngineUnavailable``."""
    gigatoken = _gigatoken()
    content = json.loads(definition)
    special = [token["content"] for token in content["added_tokens"] if token["special"]]
    # Text that spells a control token stays text.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    engine = _built(lambda: gigatoken.Tokenizer.from_json(json.dumps(content)))
    return FastTokenizer(library, engine, 0, [f"a {name} b" for name in special])
