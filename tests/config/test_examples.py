"""Every recipe and script under examples/ can be started, and says what the paper says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

from megatron_sip.config.schema import read_schema
from megatron_sip.train.config import TrainConfig, load_train_config
from megatron_sip.train.dry_run import examine

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.name for path in (EXAMPLES / "recipes").glob("*.yaml"))
SCRIPTS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".slurm"))


def recipe(name: str, *flags: str) -> TrainConfig:
    return load_train_config(["--config", str(EXAMPLES / "recipes" / name), *flags])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_80_gib_on_64_devices_on_8_and_on_one_replica(name: str) -> None:
    config = recipe(name, "--dry-run-device-gib", "80")
    for world_size in (2,) if name.startswith("quickstart") else (64, 8, 1):
        assert examine(config, world_size).fits


def test_a_recipe_moves_to_another_folder_by_one_flag() -> None:
    config = recipe("quickstart.yaml", "--run-dir", "elsewhere")
    assert (config.checkpoint.save, config.checkpoint.load) == ("elsewhere/checkpoints", "elsewhere/checkpoints")
    assert config.observability.tensorboard_dir == "elsewhere/tensorboard"
    for name in RECIPES:
        run_dir = f"runs/{name.removesuffix('.yaml')}"
        assert recipe(name).observability.run_dir == run_dir
        assert recipe(name).checkpoint.save == f"{run_dir}/checkpoints"


def test_the_recipes_hold_the_papers_settings() -> None:
    scratch, continued = recipe("scratch-safety.yaml"), recipe("continued-quality.yaml")
    for config, steps, lr, warmup in ((scratch, 21000, 5e-4, 2000), (continued, 2000, 5e-6, 100)):
        assert (config.training.train_iters, config.engine.lr, config.engine.lr_warmup_iters) == (steps, lr, warmup)
        assert config.engine.min_lr == pytest.approx(0.1 * lr)
        assert config.engine.lr_decay_style == "cosine"
        assert (config.training.global_batch_size, config.data.seq_length, config.data.suffix_length) == (
            256,
            2048,
            128,
        )
        assert config.curriculum.curriculum == "" and config.curriculum.phases == ()
    assert (scratch.objective.objective, scratch.rollout.candidates) == ("rf_nll", "rewrite,rollout:1")
    assert (continued.objective.objective, continued.rollout.candidates) == ("online_dpo", "suffix,rollout:16")
    assert examine(continued, 64).phases[0].judge.total == 174_080
    assert examine(scratch, 64).passes["sip"] == pytest.approx(20.9, abs=0.05)
    weights = {
        name: recipe(f"{name}.yaml").teacher.weights
        for name in ("scratch-safety", "continued-quality", "continued-safety", "continued-factuality")
    }
    assert weights == {
        "scratch-safety": {"quality": 1.0, "safety": 1.0, "factuality": 0.0},
        "continued-quality": {"quality": 1.0, "safety": 0.0, "factuality": 0.0},
        "continued-safety": {"quality": 1.0, "safety": 1.0, "factuality": 0.0},
        "continued-factuality": {"quality": 1.0, "safety": 0.0, "factuality": 1.0},
    }


@pytest.mark.parametrize("text", [[], [Path("mine.jsonl"), Path("more.jsonl")]], ids=["gathered", "own text"])
def test_the_quickstart_trains_on_what_it_has_made_wherever_that_is(text: list[Path]) -> None:
    from tools.quickstart import all_stages

    run_dir = Path("elsewhere")
    stages = all_stages(run_dir, EXAMPLES / "recipes" / "quickstart.yaml", 2, ["--seed", "3"], text)
    assert any(word.endswith("gather_corpus.py") for stage in stages for word in stage.command) == (not text)
    (words,) = [stage.command for stage in stages if any(word.endswith("pretrain_sip.py") for word in stage.command)]
    config = load_train_config(words[next(i for i, word in enumerate(words) if word.endswith("pretrain_sip.py")) + 1 :])
    made = {str(stage.output).removesuffix(".idx") for stage in stages}
    used = {*config.data.data_path, *config.data.valid_data_path}
    assert used | {config.tokenizer.tokenizer_model, config.teacher.judge_model} <= made
    assert config.checkpoint.save == "elsewhere/checkpoints" and config.training.seed == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound_shell(name: str) -> None:
    checked = subprocess.run(["bash", "-n", str(EXAMPLES / name)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_name_recipes_and_flags_that_exist(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    for found in re.findall(r"recipes/([\w.-]+\.yaml)", text):
        assert found in RECIPES
    known = {*read_schema(TrainConfig).flags, "--config", "--dry-run"}
    # Flags of the trainer stand after the name of the program; those that launch.sh collects, in parentheses.
    blocks = [*re.findall(r"pretrain_sip\.py((?:.*\\\n)*.*)", text), *re.findall(r"flags\+?=\((.*)\)", text)]
    for flag in (flag for block in blocks for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", block)):
        assert flag in known, f"{name}: {flag}"


def test_the_launcher_turns_its_variables_into_flags_and_counts_the_ranks(tmp_path: Path) -> None:
    """A stand-in for Python prints the arguments that it would be started with."""
    echo = tmp_path / "python"
    echo.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    variables = {
        "PATH": os.environ["PATH"], "PYTHON": str(echo), "DRY_RUN": "1", "NNODES": "4", "GPUS_PER_NODE": "8",
        "DATA_PATH": "0.3 a 0.7 b", "PRETRAINED": "weights",
    }  # fmt: skip
    script = str(EXAMPLES / "llama2_1.4b_continued.sh")
    said = subprocess.run(["bash", script, "--lr", "1e-6"], env=variables, capture_output=True, text=True, check=True)
    expected = (
        "pretrain_sip.py --config examples/recipes/continued-quality.yaml --data-path 0.3 a 0.7 b "
        "--pretrained-checkpoint weights --lr 1e-6 --dry-run --dry-run-world-size 32"
    )
    assert said.stdout.replace("\n", " ").strip() == expected


def test_the_launcher_finds_a_recipe_where_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").touch()
    variables = {"PATH": os.environ["PATH"], "PYTHON": "/bin/echo", "DRY_RUN": "1"}
    script = ["bash", str(EXAMPLES / "launch.sh"), "own.yaml"]
    said = subprocess.run(script, env=variables, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"--config {tmp_path / 'own.yaml'} " in said.stdout


def test_the_launcher_gives_ranks_the_time_to_save_that_torchrun_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "torchrun"
    stub.write_text("#!/bin/sh\necho $TORCH_ELASTIC_SHUTDOWN_TIMEOUT\n")
    stub.chmod(0o755)
    variables = {key: value for key, value in os.environ.items() if key != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    command = ["bash", str(EXAMPLES / "launch.sh"), "examples/recipes/quickstart.yaml"]
    said = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()
    assert float(said) == 270
    # What torchrun builds of it, in the torch that is installed: 30 s without the variable.
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", said)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 270
