"""Tools end with one line, whatever ends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.errors import DataError
from tools._exit import one_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("error", [DataError("a.jsonl:2: broken"), OSError("the disk is gone")])
def test_what_the_user_can_mend_is_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit) as ended, one_line("tool"):
        raise error
    assert ended.value.code == f"tool: {error}"


def test_an_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line("tool"):
        _ = 1 / 0


def test_an_interrupt_is_one_line_and_the_status_of_sigint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line("tool"):
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == "tool: interrupted\n"


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    program = "from tools._exit import one_line\nwith one_line('tool'):\n    for i in range(10**6): print(i)\n"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_gathering_says_what_is_not_there(tmp_path: Path) -> None:
    for flags, message in (
        (("--packages", "no_such_package"), "got no document of 0 (packages not installed: no_such_package)"),
        (("--packages", "yaml", "--workers", "0"), "--workers 0: must be at least 1"),
        (("--packages", "yaml", "--text-dir", f"{tmp_path}/none"), "none: no such folder"),
    ):
        command = [sys.executable, ROOT / "tools/gather_corpus.py", "--output-dir", tmp_path / "out", *flags]
        failed = subprocess.run(command, capture_output=True, text=True)
        assert failed.returncode == 1 and message in failed.stderr and failed.stderr.count("\n") == 1
        assert not list(tmp_path.glob("out/*"))
