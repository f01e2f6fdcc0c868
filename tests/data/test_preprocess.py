"""tools/preprocess_data.py: Megatron's files, bad input with file and line, nothing half written."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_sip.data.indexed import open_indexed, read_meta
from megatron_sip.data.preprocess import PreprocessConfig, PreprocessReport, preprocess
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
NULL = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=999)


def silent(line: str) -> None:
    """Drops progress."""


def run(folder: Path, lines: list[bytes], name: str = "in.jsonl", **changes: object) -> PreprocessReport:
    (folder / name).write_bytes(b"".join(lines))
    config = PreprocessConfig((str(folder / name),), str(folder / "out"), NULL, append_eod=True)
    return preprocess(replace(config, **changes), silent)  # type: ignore[arg-type]


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = io.BytesIO()
    texts = [f"document {i} tells of {i % 7} things and of {i % 11} others" for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "spm.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_equal_megatrons_own_preprocessing(tmp_path: Path, spm_model: str, workers: int) -> None:
    rng = np.random.default_rng(0)
    # About 3 MB: several batches, so that two workers really interleave.
    texts = [f"document {i}: " + "of things é東 " * int(rng.integers(1, 400)) for i in range(1200)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    # What Megatron-LM's tool does for each line, with Megatron-Core's builder.
    processor = sentencepiece.SentencePieceProcessor(model_file=spm_model)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(320))
    for raw in source.read_text().splitlines():
        ids = [*processor.encode(json.loads(raw)["text"]), processor.eos_id()]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    tokenizer = TokenizerConfig(tokenizer_model=spm_model)
    config = PreprocessConfig(
        (str(source),), str(tmp_path / "ours"), tokenizer, workers=workers, append_eod=True, log_interval=100
    )
    shown: list[str] = []
    report = preprocess(config, shown.append)
    for suffix in (".bin", ".idx"):
        ours, theirs = tmp_path / f"ours_text_document{suffix}", tmp_path / f"theirs{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()
    assert report.num_documents == 1200
    assert shown[0].startswith("tokenizing by sentencepiece ")
    assert all(word in shown[1] for word in ("MB/s", "tokens/s", "to go"))
    built = build_tokenizer(tokenizer)
    assert open_indexed(str(tmp_path / "ours_text_document"), built.vocab_size, built.fingerprint).num_documents == 1200
    meta = read_meta(str(tmp_path / "ours_text_document"))
    assert meta is not None and meta.tokenizer_engine == built.engine


def test_compressed_and_several_inputs_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line("1 2")))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "b.jsonl.zst").write_bytes(compress(line("3") + b'{"text"') + compress(b': "4"}\n'))
    (tmp_path / "c.jsonl").write_bytes(line("5").rstrip(b"\n"))
    config = PreprocessConfig((str(tmp_path / "*.jsonl*"),), str(tmp_path / "out"), NULL)
    assert preprocess(config, silent).num_documents == 4
    assert open_indexed(str(tmp_path / "out_text_document"), 1000).tokens(0, 5).tolist() == [1, 2, 3, 4, 5]


def test_every_field_gets_a_corpus_of_its_own(tmp_path: Path) -> None:
    rows = [b'{"title": "7", "text": "1 2"}\n', b'{"title": "", "text": "3"}\n']
    report = run(tmp_path, rows, json_keys=("text", "title"))
    assert open_indexed(str(tmp_path / "out_text_document"), 1000).document_lengths.tolist() == [3, 2]
    assert open_indexed(str(tmp_path / "out_title_document"), 1000).document_lengths.tolist() == [2]
    assert report.num_empty == {"text": 0, "title": 1}


BROKEN = [
    (b'{"text": "1 2"\n', "broken JSON"),
    (b'{"text": "1"} x\n', "broken JSON"),
    (b'["text"]\n', "a JSON object was expected, not list"),
    (b'{"body": "1"}\n', "no field 'text'; it has 'body'"),
    (b'{"text": 5}\n', "field 'text' is int, not text"),
    (b'{"text": "\xff1"}\n', "not UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}\n', "half of a surrogate pair at character 0"),
    (b"[" * 100_000 + b"\n", "nested too deeply"),
]


@pytest.mark.parametrize(("bad", "message"), BROKEN)
def test_a_broken_line_fails_with_file_and_line_and_writes_nothing(tmp_path: Path, bad: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{message}.*--on-error skip"):
        run(tmp_path, [line("1"), b"\n", bad, line("2")])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_broken_lines_are_counted_under_skip_and_nothing_else_is_lost(tmp_path: Path) -> None:
    lines = [line("1 2"), b"  \n", *(bad for bad, _ in BROKEN), line(""), line("3")]
    report = run(tmp_path, lines, on_error="skip", workers=2)
    assert (report.num_lines, report.num_documents, report.num_blank, report.num_errors) == (12, 3, 1, 8)
    assert report.num_empty == {"text": 1}
    assert [error.split(": ")[0].rsplit(":")[-1] for error in report.errors] == [str(i) for i in range(3, 11)]
    corpus = open_indexed(str(tmp_path / "out_text_document"), 1000)
    assert [corpus.document(i).tolist() for i in range(2)] == [[1, 2, 999], [3, 999]]
    assert json.loads((tmp_path / "out_text_document.meta.json").read_text())["num_skipped"] == 8


@pytest.mark.parametrize("lines", [[], [b"\n", b" \n"], [line(""), line(" ")]])
def test_input_without_a_document_is_an_error(tmp_path: Path, lines: list[bytes]) -> None:
    with pytest.raises(DataError, match=rf"no document with text in 'text' among {len(lines)} lines"):
        run(tmp_path, lines)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_compressed_file_is_an_error_also_under_skip(tmp_path: Path, suffix: str) -> None:
    text = b"".join(line(str(number)) for number in np.random.default_rng(0).integers(0, 999, 20_000))
    packed = gzip.compress(text) if suffix == "gz" else zstandard.ZstdCompressor().compress(text)
    with pytest.raises(DataError, match=rf"in\.jsonl\.{suffix}: damaged or truncated after line"):
        run(tmp_path, [packed[: len(packed) // 2]], f"in.jsonl.{suffix}", on_error="skip")


def test_options_that_cannot_work_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--input .*absent\.jsonl: no such file"):
        preprocess(PreprocessConfig((str(tmp_path / "absent.jsonl"),), str(tmp_path / "out"), NULL))
    with pytest.raises(ConfigurationError, match="--on-error ignore"):
        run(tmp_path, [line("1")], on_error="ignore")
    with pytest.raises(ConfigurationError, match="--workers 0"):
        run(tmp_path, [line("1")], workers=0)


def start_tool(folder: Path, limit_blocks: int | None = None, workers: int = 1) -> subprocess.Popen[str]:
    """The tool in its own process on input that takes it some seconds."""
    words = " ".join(map(str, range(900)))
    (folder / "in.jsonl").write_bytes(line(words) * 10_000)
    flags = ["--input", folder / "in.jsonl", "--output-prefix", folder / "out"]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "999", "--workers", workers]
    command = [sys.executable, str(TOOL), *map(str, flags)]
    if limit_blocks is not None:
        command = ["bash", "-c", f'ulimit -f {limit_blocks}; exec "$@"', "bash", *command]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A suite that a shell has put into the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize(
    ("how", "group"), [(signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
def test_a_killed_run_leaves_no_corpus_and_can_be_repeated(tmp_path: Path, how: signal.Signals, group: bool) -> None:
    tool = start_tool(tmp_path, workers=2 if group else 1)
    partial = tmp_path / "out_text_document.bin.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    if group:  # as a time limit or Ctrl-C does, workers included
        os.killpg(tool.pid, how)
    else:
        tool.send_signal(how)
    tool.communicate(timeout=60)
    left = {path.name for path in tmp_path.iterdir()} - {"in.jsonl"}
    assert left == ({partial.name} if how == signal.SIGKILL else set())
    with pytest.raises(DataError, match="no such file"):
        open_indexed(str(tmp_path / "out_text_document"), 1000)
    run(tmp_path, [line("1 2")])
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".idx", ".json", ".jsonl"}


def test_a_file_system_that_takes_no_more_is_reported_and_left_clean(tmp_path: Path) -> None:
    # A limit on file size makes the kernel refuse the write, as a full disk does.
    tool = start_tool(tmp_path, limit_blocks=2000)
    _, message = tool.communicate(timeout=60)
    assert tool.returncode == 1
    assert message.startswith("preprocess_data: ")
    assert "File too large after" in message and "free space" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("output", ["--output-prefix", "--output-dir"])
@pytest.mark.parametrize("place", ["/proc/no/such/place", "a_file/corpus"])
def test_output_that_cannot_be_made_is_one_line(tmp_path: Path, output: str, place: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "1 2 3"}\n')
    (tmp_path / "a_file").write_text("")
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "in.jsonl"), output, str(tmp_path / place)]
    command += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"preprocess_data: {tmp_path / place}")
    assert "cannot be written (" in done.stderr and "choose another place" in done.stderr
