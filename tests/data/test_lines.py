"""Examples of JSON-lines files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.data.lines import LinesDataset, line_streams
from megatron_sip.errors import DataError


def write(path: Path, *numbers: int) -> str:
    path.write_text("".join(f'{{"n": {number}}}\n' for number in numbers))
    return str(path)


def test_every_line_is_an_example_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n\n{"n": "ü"}\n  \n{"n": 3}')
    dataset = LinesDataset(str(path))
    assert [dataset.get(index, 0, 0).record["n"] for index in range(len(dataset))] == [1, "ü", 3]


def test_an_epoch_gives_each_line_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    stream = line_streams([write(tmp_path / "a.jsonl", *range(20))], seed=3, flag="--train-data")
    epochs = [[stream[20 * epoch + i].record["n"] for i in range(20)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1] != list(range(20))
    assert stream[7].sample_id == 7


def test_files_without_weights_share_by_their_lines_and_with_weights_by_those(tmp_path: Path) -> None:
    small, large = write(tmp_path / "s.jsonl", *range(10)), write(tmp_path / "l.jsonl", *range(100, 130))
    for values, share in (([small, large], 0.25), (["1", small, "1", large], 0.5)):
        stream = line_streams(values, seed=3, flag="--train-data")
        assert sum(stream[i].record["n"] < 100 for i in range(40)) == 40 * share


def test_what_is_no_example_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n[1]\n{"n"\n')
    dataset = LinesDataset(str(path))
    with pytest.raises(DataError, match=r"a.jsonl:2: list in place"):
        dataset.get(1, 0, 0)
    with pytest.raises(DataError, match=r"a.jsonl:3: no JSON"):
        dataset.get(2, 0, 0)
    with pytest.raises(DataError, match="has no line"):
        LinesDataset(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        LinesDataset(str(tmp_path / "missing.jsonl"))
