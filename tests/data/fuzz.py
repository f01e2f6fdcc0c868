"""Files of broken and whole lines, for tests and for benchmarks/fuzz_preprocess.py."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

_WORDS = ["text", "é", "東京", "\U0001f600", "a b", "\x00", '"', "\\", "\u2028", ""]


def _valid(rng: np.random.Generator) -> bytes:
    text = " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), rng.integers(0, 12)))
    return json.dumps(
        {"text": text, "n": float("nan") if rng.random() < 0.1 else 1}, ensure_ascii=bool(rng.integers(2))
    ).encode()


def _line(rng: np.random.Generator) -> bytes:
    """One line, without a line end in it."""
    valid = _valid(rng)
    kind = int(rng.integers(0, 12))
    if kind == 0:
        return valid[: int(rng.integers(0, len(valid)))]
    if kind == 1:
        broken = bytearray(valid)
        broken[int(rng.integers(0, len(broken)))] = int(rng.integers(0, 256))
        return bytes(broken).replace(b"\n", b" ")
    if kind == 2:
        return bytes(rng.integers(0, 256, int(rng.integers(0, 40)), dtype=np.uint8)).replace(b"\n", b"")
    if kind == 3:
        return [b"", b" ", b"\t\r", b"\x00", b"\xef\xbb\xbf", b"null", b"5", b"[]", b"{}", b'"text"'][
            rng.integers(0, 10)
        ]
    if kind == 4:
        return b'{"text": "\\ud800 %d"}' % rng.integers(0, 9)
    if kind == 5:
        depth = int(rng.integers(1, 3000))
        return b'{"text": ' + b"[" * depth + b"]" * depth + b"}"
    if kind == 6:
        values = [None, 5, 1.5, True, [], {}, ["a"], {"text": "a"}]
        return json.dumps({"text": values[int(rng.integers(0, len(values)))]}).encode()
    if kind == 7:
        return b'{"text": "' + b"x" * int(rng.integers(90_000, 110_000)) + b'"}'
    if kind == 8:
        return b'{"text": "a", "big": ' + b"9" * int(rng.integers(1, 6000)) + b"}"
    return valid


def _table(rng: np.random.Generator) -> tuple[list[bytes], bytes]:
    """Rows and the bytes of a Parquet file: text that may be no text, or no UTF-8, and a structure beside it."""
    texts: list[bytes | None] = []
    for _ in range(int(rng.integers(1, 12))):
        kind = int(rng.integers(0, 5))
        noise = bytes(rng.integers(0, 256, int(rng.integers(0, 40)), dtype=np.uint8))
        texts.append(None if kind == 0 else noise if kind == 1 else _WORDS[int(rng.integers(0, len(_WORDS)))].encode())
    values: pyarrow.Array = pyarrow.array(texts, pyarrow.binary())
    kind = int(rng.integers(0, 4))
    if kind < 2:
        # Arrow checks nothing when it is told what bytes are: so do writers of broken files.
        values = values.view([pyarrow.string(), pyarrow.binary()][kind])
    elif kind == 2:
        values = pyarrow.array([[1], None] * len(texts), pyarrow.list_(pyarrow.int64()))[: len(texts)]
    nested = pyarrow.StructArray.from_arrays([pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())], ["a"])
    names = ["text" if kind < 3 else "other", "meta"]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table([values if kind < 3 else nested, nested], names=names), stream)
    return [text or b"" for text in texts], stream.getvalue()


def fuzzed_file(rng: np.random.Generator) -> tuple[list[bytes], bytes, str, bool]:
    """Lines or rows, the file's bytes, its suffix, and whether it was cut."""
    lines = [_line(rng) for _ in range(int(rng.integers(1, 12)))]
    raw = b"".join(line + b"\n" for line in lines)
    kind = int(rng.integers(0, 5))
    if kind < 2:
        return lines, raw, "", False
    if kind == 4:
        lines, packed = _table(rng)
        suffix = ".parquet"
    elif kind == 2:
        packed, suffix = gzip.compress(raw), ".gz"
    else:
        packed, suffix = zstandard.ZstdCompressor(write_checksum=True).compress(raw), ".zst"
    if rng.random() < 0.5:
        return lines, packed, suffix, False
    return lines, packed[: int(rng.integers(1, len(packed)))], suffix, True
