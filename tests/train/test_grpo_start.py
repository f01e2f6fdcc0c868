"""What tools/train_judge.py and tools/train_rewriter.py say before they start: dry runs, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.train.grpo.config import GRPORunConfig, load_grpo_config
from megatron_sip.train.grpo.dry_run import examine, render
from megatron_sip.train.grpo.main import main, next_commands

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes" / "teacher"


def recipe(task: str, *flags: str) -> GRPORunConfig:
    return load_grpo_config(["--config", str(RECIPES / f"{task}-llama3.1-8b.yaml"), *flags], task)


def test_a_dry_run_of_the_papers_judge_counts_what_64_gpus_do() -> None:
    run = examine(recipe("judge", "--dry-run-device-gib", "80"), "judge", 64)
    assert run.num_parameters == 8_030_261_248  # the model card's 8.03 billion
    assert (run.layout.tp, run.layout.dp, run.prompts, run.answers) == (4, 16, 256, 256 * 16)
    assert (run.updates, run.micro_batches) == (1, 256 // 16)
    assert run.step_tokens == 256 * (3584 + 16 * 512)
    assert (run.measured, run.measurements, run.verdicts_per_answer) == (4608, 1 + 500 // 25, 0)
    # A fourth of the weights and half of the vocabulary's padding: 2 bytes each, gradients 4, Adam 12 / 16 replicas.
    (stage,) = run.stages
    assert stage.weights == pytest.approx(8.03e9 / 4 * 2, rel=2e-3)
    assert stage.optimizer == pytest.approx(8.03e9 / 4 * 12 / 16, rel=2e-3)
    assert stage.logits == 16 * 512 * 128_512 // 4 * 8
    assert run.fits and not run.is_ready
    text = render(run)
    assert "256 prompts: 16 on each of 16 replicas" in text and "This run cannot start: 6 missing." in text
    assert "tools/convert_checkpoint.py to-megatron HF_DIR data/llama3.1-8b-instruct-megatron" in text


def test_a_dry_run_of_the_papers_rewriter_counts_its_judges_verdicts() -> None:
    run = examine(recipe("rewriter", "--dry-run-device-gib", "80"), "rewriter", 64)
    assert run.step_tokens == 256 * (3968 + 16 * 128)
    assert run.verdicts_per_answer == 2 * 5  # five seeds on quality, five on safety
    assert f"{256 * 16 * 10:,} verdicts if all suffixes are unsafe" in render(run)


def test_mini_batches_passes_and_a_reference_count() -> None:
    flags = ("--mini-batches", "2", "--batch-passes", "3", "--kl-weight", "0.1", "--dry-run-device-gib", "80")
    run = examine(recipe("judge", *flags), "judge", 64)
    assert (run.updates, run.micro_batches) == (6, 8)
    assert run.step_tokens == 3 * 256 * (3584 + 16 * 512)
    assert max(run.stages[0].reference, run.host_bytes) >= run.stages[0].weights


def test_what_is_missing_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    examples = tmp_path / "examples.jsonl"
    examples.write_text("{}\n")
    sizes = ["--preset", "tiny", "--tokenizer-type", "NullTokenizer", "--vocab-size", "99", "--train-iters", "1"]
    flags = [*sizes, "--rollout-max-new-tokens", "8", "--prompt-length", "40"]

    def said(task: str, *more: str) -> str:
        assert main([*flags, *more], task) == 2
        return capsys.readouterr().err

    assert f"--train-data: no file {tmp_path}/none.jsonl" in said("judge", "--train-data", f"{tmp_path}/none.jsonl")
    both = ("--train-data", str(examples), "--valid-data", str(examples))
    assert "is also in --train-data" in said("judge", *both)
    assert "--judge-model: none, and eq. 2" in said("rewriter", *both[:2])
    assert "--judge-checkpoint: none" in said("rewriter", *both[:2], "--teacher", "model")
    assert main([*flags, *both[:2], "--dry-run"], "rewriter") == 1
    assert "This run cannot start: 1 missing." in capsys.readouterr().out


def test_a_finished_judge_names_what_it_is_good_for() -> None:
    lines = "\n".join(next_commands(recipe("judge"), "judge"))
    for words in ("tools/report.py runs/judge ", "--judge-checkpoint runs/judge/checkpoints", "tools/export_policy.py"):
        assert words in lines
