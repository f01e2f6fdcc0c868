"""A judge that GRPO trained, exported and served by a real vLLM server, says word for word what the checkpoint says in
the teacher's process. Greedy: sampled verdicts come from other random numbers."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.vllm import judge_training
from tests.vllm.server import free_port, printed_server

STEPS = 6
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the judge, and the line that tools/export_policy.py printed."""
    folder = tmp_path_factory.mktemp("judge")
    judge_training.write_start(folder)
    return folder, judge_training.train_judge(folder, STEPS)


def test_a_served_judge_says_what_its_checkpoint_says(trained: tuple[Path, str], vllm_python: str) -> None:
    folder, line = trained
    payload = {"folder": str(folder), "checkpoint": str(folder / "checkpoints")}
    own = run_ranks(1, "tests.vllm.judge_training:ask_in_process", payload, timeout_s=240.0)[0]
    assert _moved(folder) > 1e-3, "GRPO has changed no weight: the start would do as well"
    port = free_port()
    words = shlex.split(line.strip())
    assert "--skip-tokenizer-init" not in words
    words[words.index("--port") + 1] = str(port)
    command = f"TORCH_COMPILE_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 {shlex.join(words[2:])}"
    with printed_server(command, vllm_python, folder / "judge", port, folder / "server.log") as server:
        config = judge_training.settings(
            folder, teacher="http", judge_endpoints=(server.url,), judge_served_model="tiny"
        )
        for criterion, expected in own.items():
            verdicts = judge_training.ask(config, criterion, judge_training.questions(folder, criterion))
            assert [(v.score, v.raw) for v in verdicts] == expected, criterion
            assert {score for score, _ in expected} == {0.0, 1.0}, f"{criterion}: one verdict for all"


def _moved(folder: Path) -> float:
    """The largest change of a weight from the start to what is served."""
    before, after = (load_file(folder / name / "model.safetensors") for name in ("start", "judge"))
    return max(float((after[name] - before[name]).abs().max()) for name in after)
