"""Covers what a training run says of an HTTP teacher before it starts."""

from pathlib import Path

from megatron_sip.train.checks import find_missing
from megatron_sip.train.config import load_train_config
from megatron_sip.train.dry_run import judge_calls

ROOT = Path(__file__).resolve().parents[3]
SAFETY = ["--config", str(ROOT / "examples" / "recipes" / "continued-safety.yaml"), "--teacher", "http"]


def judge_lines(config):
    return [line for line in find_missing(config) if "judge" in line]


def test_missing_endpoints_and_model_are_listed_for_each_role_that_the_run_asks():
    lines = judge_lines(load_train_config(SAFETY))
    flags = ("--judge-endpoints", "--judge-served-model")
    wanted = [f"{flag}: none for {role}" for role in ("quality", "safety") for flag in flags]
    assert [line.split(";")[0] for line in lines] == wanted


def test_the_flags_of_the_slurm_job_complete_a_recipe_and_need_no_judge_file():
    flags = ["--judge-endpoints", "http://a:8000/v1", "http://b:8000/v1", "--judge-served-model", "m"]
    config = load_train_config([*SAFETY, *flags, "--judge-settings", "safety.temperature=0.7", "quality.model=n"])
    assert judge_lines(config) == []
    assert config.teacher.role_settings("safety", 5).temperature == 0.7
    assert config.teacher.role_settings("quality", 5).model == "n"
    assert config.teacher.role_settings("quality", 5).endpoints == ("http://a:8000/v1", "http://b:8000/v1")


def test_coherence_doubles_the_pairs_of_the_estimate():
    plain = load_train_config(SAFETY)
    with_coherence = load_train_config([*SAFETY, "--judge-coherence-weight", "0.5"])
    assert judge_calls(plain, 1).pairs_per_group == 136
    assert judge_calls(with_coherence, 1).pairs_per_group == 2 * 136
