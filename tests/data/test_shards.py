"""Many files: a shard each, resumed after any kill, by any number of nodes, always the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_sip.data.filters import FilterConfig
from megatron_sip.data.preprocess import PreprocessConfig, preprocess
from megatron_sip.data.sharded import NodePart, ShardedResult, merge_shards, preprocess_shards
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import TokenizerConfig

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
NULL = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=999)


def silent(line: str) -> None:
    """Drops progress."""


def write_inputs(folder: Path, num_files: int = 5, num_lines: int = 40, num_words: int = 6) -> Path:
    """Files of all compressions; the documents are numbers, each line's first one its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_files):
        rows = [[row % 999, *rng.integers(0, 999, num_words).tolist()] for row in range(num_lines)]
        raw = "".join(json.dumps({"text": " ".join(map(str, row)), "lang": "en"}) + "\n" for row in rows).encode()
        suffix = ("", ".gz", ".zst")[number % 3]
        packed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.ZstdCompressor().compress(raw)}[suffix]
        (folder / f"part{number}.jsonl{suffix}").write_bytes(packed)
    return folder


def configuration(inputs: Path, **changes: object) -> PreprocessConfig:
    config = PreprocessConfig((str(inputs),), str(inputs.parent / "merged"), NULL, append_eod=True)
    return replace(config, **changes)  # type: ignore[arg-type]


def run(inputs: Path, name: str = "shards", part: NodePart | None = None, **changes: object) -> ShardedResult:
    return preprocess_shards(configuration(inputs, **changes), inputs.parent / name, part, log=silent)


def digests(folder: Path) -> dict[str, str]:
    """Every file that counts: a killed process may leave *.partial and *.lock."""
    files = [path for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_shards_of_several_nodes_merge_to_what_one_run_writes(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    first = run(inputs, part=NodePart(0, 2))
    assert (first.num_shards, first.num_written, first.is_complete) == (3, 3, False)
    with pytest.raises(DataError, match=r"2 shards are not done \(1-part1"):
        merge_shards(configuration(inputs), tmp_path / "shards")
    assert not (tmp_path / "shards/manifest.json").exists()
    assert run(inputs, part=NodePart(1, 2), workers=2).is_complete
    total = merge_shards(configuration(inputs), tmp_path / "shards")
    assert (total.num_lines, total.num_tokens) == (200, {"text": 200 * 8})

    preprocess(configuration(inputs, output_prefix=str(tmp_path / "single")), silent)
    for suffix in (".bin", ".idx", ".meta.json"):
        merged, single = tmp_path / f"merged_text_document{suffix}", tmp_path / f"single_text_document{suffix}"
        assert merged.read_bytes() == single.read_bytes()


def test_the_manifest_tells_counts_and_checksums_of_every_shard(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", num_files=2)
    run(inputs)
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert list(manifest["shards"]) == ["0-part0", "1-part1"]
    assert manifest["counts"]["num_documents"] == 80
    for shard in manifest["shards"].values():
        assert shard["counts"]["num_lines"] == 40
        for name, noted in shard["files"].items():
            data = (tmp_path / "shards" / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (noted["num_bytes"], noted["sha256"])


def test_finished_shards_are_not_done_again_unless_they_changed(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", num_files=3)
    run(inputs)
    before = digests(tmp_path / "shards")
    result = run(inputs)
    assert (result.num_done_before, result.num_written, result.report.num_documents) == (3, 0, 120)
    damaged = tmp_path / "shards/1-part1_text_document.bin"
    data = bytearray(damaged.read_bytes())
    data[0] ^= 1
    damaged.write_bytes(bytes(data))
    assert run(inputs).num_written == 0  # the size is what it was
    config = configuration(inputs)
    assert preprocess_shards(config, tmp_path / "shards", verify=True, log=silent).num_written == 1
    damaged.unlink()
    assert run(inputs).num_written == 1
    assert digests(tmp_path / "shards") == before


def test_what_was_done_before_is_said_and_not_timed_and_a_typo_is_answered_with_the_flag(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", num_files=2)
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "999"]

    def tool(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), "--input", str(inputs), *tokenizer, *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    first, second = (tool("--output-dir", str(tmp_path / "shards")).stdout for _ in range(2))
    assert "MB/s" in first and "already done" not in first
    assert "MB/s" not in second and "0 dropped; already done" in second
    one, again = (tool("--output-prefix", str(tmp_path / "one")).stdout for _ in range(2))
    assert "replacing" not in one and f"replacing the corpus that is there: {tmp_path}/one_text_document" in again
    typo = tool("--output-prefx", "x")
    assert typo.returncode == 2 and typo.stderr.count("\n") == 1
    assert typo.stderr.startswith("error: unknown flag --output-prefx (did you mean --output-prefix?)")


def test_a_folder_begun_with_other_options_or_inputs_is_refused(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", num_files=2)
    run(inputs)
    with pytest.raises(ConfigurationError, match=r"plan\.json: begun with other append_eod True"):
        run(inputs, append_eod=False)
    (inputs / "part9.jsonl").write_text('{"text": "1"}\n')
    with pytest.raises(ConfigurationError, match=r"inputs \(2 files, now 3, or other sizes\).*--output-dir"):
        run(inputs)
    with pytest.raises(ConfigurationError, match="--shard-index 2"):
        run(inputs, "other", NodePart(2, 2))


def test_a_broken_file_does_not_stop_the_others_and_is_all_that_is_done_again(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", num_files=4)
    whole = (inputs / "part1.jsonl.gz").read_bytes()
    (inputs / "part1.jsonl.gz").write_bytes(whole[:-9] + bytes(9))  # as long as before: the plan stays
    (inputs / "part3.jsonl").write_bytes((inputs / "part3.jsonl").read_bytes().replace(b'"lang"', b'\xfflang"', 1))
    with pytest.raises(
        DataError, match=r"(?s)2 of 4 shards failed.*part1\.jsonl\.gz: damaged.*part3\.jsonl:1: not UTF"
    ):
        run(inputs)
    assert len(list((tmp_path / "shards").glob("*.done.json"))) == 2
    (inputs / "part1.jsonl.gz").write_bytes(whole)
    result = run(inputs, on_error="skip")
    assert (result.num_done_before, result.num_written) == (2, 2)
    assert (result.report.num_lines, result.report.num_documents, result.report.num_errors) == (160, 159, 1)


def test_a_shard_without_documents_is_done_and_merged_over(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", num_files=2)
    (inputs / "part2.jsonl").write_text('{"text": "5", "lang": "de"}\n\n')
    filters = FilterConfig(languages=("en",), language_field="lang")
    result = run(inputs, filters=filters)
    assert result.report.dropped == {"language": 1}
    assert result.report.num_lines == 82 == result.report.num_documents + result.report.num_blank + 1
    assert merge_shards(configuration(inputs, filters=filters), tmp_path / "shards").num_tokens == {"text": 80 * 8}


def start_tool(inputs: Path, output: Path) -> subprocess.Popen[str]:
    flags = ["--input", inputs, "--output-dir", output, "--tokenizer-type", "NullTokenizer", "--vocab-size", "999"]
    command = [sys.executable, str(TOOL), *map(str, flags), "--append-eod", "--workers", "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def size(path: Path) -> int:
    """Bytes of a file, 0 if it was renamed in the meantime."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def written_bytes(folder: Path) -> int:
    """Bytes of tokens in a folder, half written shards included."""
    return sum(size(path) for path in folder.glob("*.bin*"))


def test_killed_at_random_moments_and_resumed_the_result_is_byte_identical(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", num_files=6, num_lines=1000, num_words=300)
    undisturbed = start_tool(inputs, tmp_path / "undisturbed")
    _, message = undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0, message
    total = written_bytes(tmp_path / "undisturbed")
    num_kills = 0
    # A moment is a random amount of work done, not a time: a busy machine would make all of those too late or early.
    for share in np.sort(np.random.default_rng().uniform(0, 0.9, 3)):
        tool = start_tool(inputs, tmp_path / "disturbed")
        while tool.poll() is None and written_bytes(tmp_path / "disturbed") <= share * total:
            time.sleep(0.002)
        if tool.poll() is None:
            tool.send_signal(signal.SIGKILL)
            num_kills += 1
        tool.communicate()
    assert num_kills >= 1
    last = start_tool(inputs, tmp_path / "disturbed")
    _, message = last.communicate(timeout=200)
    assert last.returncode == 0, message
    assert digests(tmp_path / "disturbed") == digests(tmp_path / "undisturbed")
