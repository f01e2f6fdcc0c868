"""tools/plan.py as a user meets it, and the timers that its figures are compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.runs import recipe, write_corpora
from tools import plan as tool

ROOT = Path(__file__).resolve().parents[3]
PAPER = ["--config", str(ROOT / "examples/recipes/continued-quality.yaml"), "--dry-run-world-size", "64"]
SERVER = ["--judge-server", str(ROOT / "examples/hardware/judges/gpt-oss-120b-h100.yaml")]


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Exit status, what was printed, and the error."""
    status = tool.main(flags)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_papers_step_has_the_operations_that_arithmetic_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    status, printed, _ = plan(capsys, *PAPER, *SERVER, "--judge-gpus", "64", "--json", str(path))
    assert status == 0
    (phase,) = json.loads(path.read_text())["phases"]
    parts = phase["parts"]
    # 4 rows of 1,920 + 2 x 128 on each of 64 ranks; a layer has 50,593,792 weights in matrices.
    tokens, scored, weights, output = 4 * 2176, 4 * 256, 24 * 50_593_792, 32000 * 2048
    assert parts["reference"]["matmul_flops"] == 2 * (tokens * weights + scored * output)
    assert parts["train: rollout"]["matmul_flops"] == 6 * (tokens * weights + scored * output) + 2 * scored * output
    pairs = 4 * (1920**2 / 2 + 2 * (128 * 1920 + 128**2 / 2))
    assert parts["train: rollout"]["attention_flops"] == 12 * 2048 * pairs * 24
    # 127 decode steps read all weights, 4 prefixes and 64 rows of 64 tokens on average; 196,608 bytes a token.
    assert parts["rollout: decode"]["weight_bytes"] == 127 * 2 * (weights + output)
    assert parts["rollout: decode"]["cache_bytes"] == 127 * 196_608 * (4 * 1920 + 64 * 64)
    # 63/64 of float32 gradients and of bf16 weights.
    assert parts["gradient reduction"]["sent_bytes"] == 63 / 64 * 4 * 1_345_423_360
    assert parts["parameter gather"]["sent_bytes"] == 63 / 64 * 2 * 1_345_423_360
    assert phase["judge"]["calls"] == 174_080
    total = sum(sum(part["causes"].values()) for part in parts.values()) + phase["exposed_wait_s"]
    assert phase["step_s"] == pytest.approx(total)
    assert "bounded by waiting for the judge" in printed


def test_rewrites_take_a_pools_time_of_which_a_step_of_lookahead_hides_a_step(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scratch = ["--config", str(ROOT / "examples/recipes/scratch-safety.yaml"), "--dry-run-world-size", "64"]

    def planned(gpus: int, rewrite_lookahead: int) -> tuple[dict[str, float], float]:
        path = tmp_path / "plan.json"
        flags = ["--lookahead", "1", "--rewrite-lookahead", str(rewrite_lookahead), "--judge-gpus", str(gpus)]
        assert plan(capsys, *scratch, *SERVER, *flags, "--json", str(path))[0] == 0
        phase = json.loads(path.read_text())["phases"][0]
        return {name: part["seconds"] for name, part in phase["parts"].items()}, phase["judge"]["time"]["busy_s"]

    # One server: 256 prompts of 1,920 + 128 + 400 tokens at 10.2e9 operations and a quarter of 989e12 a second; two
    # waves of 128 answers of 128 tokens. All experts but (124/128)^128 of them are read: 116.8e9 - 111.7e9 / (124/128)
    # x 0.0172 parameters of 0.55 bytes, and 128 caches of 2,512 x 36,864 bytes, at half of 3.35e12 bytes/s.
    read_s = 256 * 2448 * 10.2e9 / (0.25 * 989e12)
    weights = (116.8e9 - 111.7e9 / (1 - 4 / 128) * (1 - 4 / 128) ** 128) * 0.55
    step_s = (weights + 128 * 2512 * 36864) / 1.675e12
    parts, busy_s = planned(1, 0)
    rollouts_s = parts["rollout: prefill"] + parts["rollout: decode"]
    assert parts["wait for rewrites"] == pytest.approx(read_s + 256 * step_s - rollouts_s)
    assert busy_s > read_s + 256 * step_s, "the same server writes the verdicts"
    others_s = sum(seconds for name, seconds in parts.items() if name != "wait for rewrites")
    # A step earlier: the server's work for a step, of which it does no more than one a step.
    parts, _ = planned(1, 1)
    assert parts["wait for rewrites"] == pytest.approx(read_s + 256 * step_s - others_s)
    # A pool whose work is less than a step's hides it all.
    assert planned(64, 0)[0]["wait for rewrites"] > 0
    assert planned(64, 1)[0]["wait for rewrites"] == 0


def test_lookahead_and_fewer_questions_shorten_the_wait(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def exposed(*flags: str) -> float:
        path = tmp_path / "plan.json"
        assert plan(capsys, *PAPER, *SERVER, "--judge-gpus", "64", "--json", str(path), *flags)[0] == 0
        wait: float = json.loads(path.read_text())["phases"][0]["exposed_wait_s"]
        return wait

    everything = exposed()
    assert exposed("--lookahead", "1") < everything
    assert exposed("--judge-votes", "1") < everything / 3
    assert exposed("--pair-schedule", "best_worst", "--pair-budget", "40") < everything / 2


def test_pipeline_stages_wait_for_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def train_s(*flags: str) -> float:
        path = tmp_path / "plan.json"
        assert plan(capsys, *PAPER, "--curriculum", "ntp", "--json", str(path), *flags)[0] == 0
        part = json.loads(path.read_text())["phases"][0]["parts"]["train: ntp"]
        seconds: float = part["causes"]["arithmetic"]
        return seconds

    # Two stages, 32 replicas: 2 micro-batches of 4 windows and half of one more at the start and at the end; a stage
    # has half of the layers, the last one the output layer too.
    layers, output = 24 * 50_593_792 + 24 * 2048 * 2048, 32000 * 2048
    expected = 3 * (layers / 2 + output) / (layers + output)
    found = train_s("--pipeline-model-parallel-size", "2") / train_s()
    assert found == pytest.approx(expected, rel=0.05)  # attention reaches another share of the peak


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hardware", "absent.yaml"], "--hardware absent.yaml: there is no such file"),
        ([*SERVER, "--judge-gpus", "0"], "--judge-gpus is 0: give at least 1"),
        (["--judge-gpus", "8"], "--judge-gpus needs --judge-server"),
        (["--prefix-tokens", "4000"], "--prefix-tokens is 4000: give 1 to 1920"),
        (["--preset", "llama3.1-8b", "--vocab-size", "128256"], "GiB on a rank, H100 SXM has 80: lower"),
        (["--micro-batch-sise", "4"], "unknown flag --micro-batch-sise (did you mean --micro-batch-size?)"),
    ],
)
def test_bad_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    status, printed, error = plan(capsys, *PAPER, *flags)
    assert (status, printed) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_help_and_plans_need_no_torch() -> None:
    for flags in (["--help"], PAPER):
        program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = {flags!r}\nfrom tools import plan\n"
        program += (
            "try:\n    plan.main(sys.argv[1:])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_timers_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    payload = {
        "recipe": recipe(tmp_path, probe_interval=2, probe_samples=4, valid_data_path=[str(tmp_path / "validation")])
    }
    records = run_ranks(1, "tests.train.runs:train", payload)[0]["records"]
    for record in records:
        parts = {name: value for name, value in record.items() if name.startswith("timing/")}
        evaluation_s = parts.pop("timing/evaluation_s", None)
        assert sum(parts.values()) == pytest.approx(record["iteration-time"])
        assert min(parts.values()) >= 0
        assert parts["timing/reference_s"] > 0
        assert (evaluation_s is not None) == (record["step"] % 2 == 0)
