"""Results on disk: whole or as before, and errors that name the path. A full disk is /dev/full, or a patched write."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.errors import DataError
from megatron_sip.files import require_folder_of, write_text
from megatron_sip.observability.metrics import MetricsLog
from megatron_sip.observability.report import write_report

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file gets the first half of what is written to it, and then there is no room."""

    def write_bytes(path: Path, data: bytes) -> int:
        with open(path, "wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_a_full_disk_leaves_the_file_that_was_there_and_is_said_with_its_path(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "result.json"
    path.write_text("former")
    with pytest.raises(DataError, match=r"result\.json cannot be written \(No space left on device\).*make room"):
        write_text(path, "new and longer")
    assert path.read_text() == "former" and [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_report_on_a_full_disk_leaves_the_former_one(tmp_path: Path, full_disk: None) -> None:
    log = MetricsLog(str(tmp_path))
    log.log(1, {"lm loss": 5.0}, 16, {"phase": "all"})
    log.close()
    (tmp_path / "report.html").write_text("former")
    with pytest.raises(DataError, match=r"report\.html cannot be written \(No space left on device\)"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "former"


def test_a_device_gets_the_text_itself() -> None:
    with pytest.raises(DataError, match="/dev/full cannot be written"):
        write_text(Path("/dev/full"), "x")
    write_text(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file() and not Path("/dev/null.partial").exists()


def test_an_output_in_a_folder_that_does_not_exist_is_refused_and_makes_none(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path))
    log.log(1, {"lm loss": 5.0}, 16, {"phase": "all"})
    log.close()
    output = tmp_path / "typo" / "report.html"
    with pytest.raises(DataError, match=r"-o .*report\.html: there is no folder .*typo"):
        write_report(tmp_path, output)
    assert not output.parent.exists()
    with pytest.raises(DataError, match="is a folder: name a file in it"):
        require_folder_of(tmp_path, "-o")


def test_a_plan_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    flags = ["--config", "examples/recipes/scratch-next-token.yaml", "--hardware", "examples/hardware/h100.yaml"]
    flags += ["--dry-run-world-size", "64", "--json", str(tmp_path / "typo" / "plan.json")]
    done = subprocess.run(
        [sys.executable, "tools/plan.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: --json ") and done.stderr.count("\n") == 1
    assert "there is no folder" in done.stderr and not done.stdout


def test_text_is_whole_json(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", json.dumps({"a": "ä"}, ensure_ascii=False))
    assert (tmp_path / "a.json").read_bytes() == '{"a": "ä"}'.encode()
