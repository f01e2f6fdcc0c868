"""One model, three backends of lm-evaluation-harness: transformers', ours, and a real vLLM server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.interop.lm_eval_local import SCORES, flags_of, scores_by_transformers, write_tasks_and_model
from tests.ranks import run_ranks
from tests.vllm.server import vllm_server
from tools.run_lm_eval import main

LENGTH = 256


def test_scores_of_the_three_backends_agree(vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'megatron-sip[lm-eval]'")
    write_tasks_and_model(tmp_path, LENGTH)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache/parent"))
    flags = flags_of(tmp_path, tmp_path / "ours.json")
    flags += ["--config", str(tmp_path / "megatron/recipe.yaml")]
    [report] = run_ranks(1, "tests.interop.lm_eval_claims:scores", {"flags": flags, "cache": str(tmp_path / "cache")})
    assert report["status"] == 0
    ours, theirs = report["results"]["results"], scores_by_transformers(tmp_path, LENGTH)

    with vllm_server(vllm_python, tmp_path / "policy", tmp_path / "server.log", "--max-model-len", "256") as server:
        asked = flags_of(tmp_path, tmp_path / "served.json")
        asked += ["--endpoint", server.root, "--served-model-name", "tiny", "--tokenizer", str(tmp_path / "policy")]
        assert main(asked) == 0
    served = json.loads((tmp_path / "served.json").read_text())["results"]
    for task, metric in SCORES:
        found = {name: scores[task][metric] for name, scores in {"ours": ours, "vllm": served}.items()}
        print(task, metric, theirs[task][metric], found)
        assert found == pytest.approx(dict.fromkeys(found, theirs[task][metric]), rel=1e-4), (task, metric)
