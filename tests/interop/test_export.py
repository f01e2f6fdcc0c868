"""tools/export_policy.py: one command from a checkpoint to a directory that transformers loads and a line for vLLM."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sip.checkpoint.huggingface import to_megatron
from tests.interop.claims import ROWS
from tests.interop.models import TEXT, save_model
from tests.ranks import run_ranks
from tools.export_policy import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A converted model with a tied output layer and padded vocabulary, and its logits for real tokens."""
    import transformers

    root = tmp_path_factory.mktemp("export")
    model = save_model(root / "model", "llama31")
    to_megatron(root / "model", root / "megatron")
    with torch.no_grad():
        logits = model(ROWS).logits[..., : len(transformers.AutoTokenizer.from_pretrained(root / "model"))]
    return root / "megatron", logits


def test_what_it_writes_gives_the_same_logits_and_what_it_prints_serves_it(
    checkpoint: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    root, expected = checkpoint
    assert main([str(root), str(tmp_path / "policy"), "--port", "9001", "--tensor-parallel-size", "2"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["vllm", "serve", str(tmp_path / "policy")]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert flags == {
        "--served-model-name": "policy", "--host": "127.0.0.1", "--port": "9001", "--dtype": "float32",
        "--max-model-len": "64", "--tensor-parallel-size": "2",
    }  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS).logits, expected, rtol=1e-5, atol=1e-5)


def test_for_rollouts_it_opens_what_weights_come_through_and_may_untie_the_output(
    checkpoint: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    root, expected = checkpoint
    assert main([str(root), str(tmp_path / "policy"), "--for-rollouts", "--untie", "--max-shard-gib", "1e-5"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("VLLM_SERVER_DEV_MODE=1 vllm serve ")
    assert line.endswith(" --enable-scale-out --logprobs-mode raw_logprobs")
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (False, expected.shape[-1])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_the_tokenizer_of_a_run_goes_along_from_beside_its_checkpoints(
    kind: str, checkpoint: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    root, expected = checkpoint
    # A SentencePiece model is no tokenizer of transformers: that of the weights that the run started from goes along.
    own = {"type": kind, "save": str(tmp_path / "run"), "start": None, "tokenizer": str(root / "huggingface")}
    if kind == "SentencePieceTokenizer":
        own |= {"tokenizer": "tokenizer.model", "start": str(root)}
    run_ranks(2, "tests.interop.claims:carry", own)
    shutil.copytree(root / "release", tmp_path / "run/iter_0000003")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("3\n")
    assert main([str(tmp_path / "run"), str(tmp_path / "policy")]) == 0
    printed = capsys.readouterr()
    assert "--skip-tokenizer-init" not in printed.out and printed.err == ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS).logits, expected, rtol=1e-5, atol=1e-5)


def test_on_cpu_it_prints_the_module_form_and_the_transfer_that_the_server_is_for(
    checkpoint: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = checkpoint
    assert main([str(root), str(tmp_path / "a"), "--for-rollouts", "--cpu", "--weight-transfer", "gloo"]) == 0
    words = shlex.split(capsys.readouterr().out)
    package = Path(__file__).resolve().parents[2]
    assert words[:6] == [
        "VLLM_SERVER_DEV_MODE=1", f"PYTHONPATH={package}", "TORCH_COMPILE_DISABLE=1", "VLLM_CPU_KVCACHE_SPACE=1",
        "python", "-m",
    ]  # fmt: skip
    assert words[6:9] == ["vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "a")]
    assert "--no-enable-chunked-prefill" in words and "--enable-scale-out" in words
    assert words[-4:] == ["--weight-transfer-config", '{"backend": "gloo"}',
                          "--worker-extension-cls", "megatron_sip.rollout.vllm.gloo_worker.GlooTransfer"]  # fmt: skip
    assert json.loads((tmp_path / "a/config.json").read_text())["tie_word_embeddings"] is False
    assert main([str(root), str(tmp_path / "b"), "--for-rollouts", "--weight-transfer", "nccl"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve"]
    assert words[-2:] == ["--weight-transfer-config", '{"backend": "nccl"}']


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    checkpoint: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = checkpoint
    for arguments, message in (
        ([str(tmp_path / "nothing")], "holds no checkpoint"),
        ([str(root), "--vocab-rows", "500"], "--vocab-rows 500: the checkpoint has"),
        ([str(root), "--step", "7"], "7"),
        ([str(root), "--tensor-parallel-size", "3"], "vLLM cannot split 4 heads and 2 key-value heads so"),
    ):
        assert main([arguments[0], str(tmp_path / "policy"), *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port 70000: give a number from 1 to 65535"),
        (["--max-shard-gib", "0"], "0 is not above 0"),
        (["--weight-transfer", "gloo", "--cpu"], "has no use without --for-rollouts"),
        (["--for-rollouts", "--weight-transfer", "gloo"], "add --cpu"),
        (["--for-rollouts", "--weight-transfer", "nccl", "--cpu"], "with --cpu give gloo or files"),
    ],
)
def test_a_line_that_could_not_serve_is_refused_before_the_export(
    flags: list[str], message: str, checkpoint: tuple[Path, torch.Tensor], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as raised:
        main([str(checkpoint[0]), str(tmp_path / "policy"), *flags])
    assert raised.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
