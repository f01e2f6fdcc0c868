"""A ledger as one Parquet file."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.ledger.reading import Filter, Reader

_ROWS_AT_ONCE = 50_000


def export_parquet(reader: Reader, chosen: Filter, output: Path, with_raw: bool = True) -> int:
    """One row per verdict, the columns of the view ``verdicts`` with ``replica`` and ``raw``. Returns the rows.

    The file appears whole or not at all. Raises ConfigurationError without pyarrow, or where it cannot be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError("export needs the package pyarrow: pip install pyarrow") from error
    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    types = {"step": whole, "sample_id": whole, "vote": whole, "score": real, "latency_s": real, "created_s": real}
    names = ("criterion", "judge", "model", "sampling", "prompt", "step", "sample_id", "options", "vote", "score",
             "failure", "message", "latency_s", "created_s", "lost")  # fmt: skip
    fields = [("replica", whole), *((n, pyarrow.bool_() if n == "lost" else types.get(n, text)) for n in names)]
    schema = pyarrow.schema([*fields, *([("raw", text)] if with_raw else [])])
    temporary, count = output.with_name(output.name + ".tmp"), 0
    rows = reader.rows(chosen, with_raw=with_raw)
    try:
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
                records = [
                    {"replica": r.replica, **r.values, "lost": bool(r.values["lost"]), "raw": r.raw} for r in some
                ]
                writer.write_table(pyarrow.Table.from_pylist(records, schema))
                count += len(some)
        os.replace(temporary, output)
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written ({error}): name another file") from error
    return count
