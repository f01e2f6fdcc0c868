"""The options of a training run: what its sections must agree on. The machinery is tested in test_config.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sip.config import to_yaml
from megatron_sip.config.schema import read_schema
from megatron_sip.config.yaml_text import parse_yaml
from megatron_sip.errors import ConfigurationError
from megatron_sip.train.checks import check_layout, find_missing, require_present, uses_judge, uses_rewriter
from megatron_sip.train.config import TrainConfig, load_train_config, train_config_from

COMPLETE: dict[str, Any] = {
    "train_iters": 100,
    "global_batch_size": 16,
    "data_path": ["corpus"],
    "valid_data_path": ["held_out"],
    "tokenizer_model": "tokenizer.model",
    "judge_model": "judge.npz",
    "seq_length": 128,
    "suffix_length": 32,
}


def config(**changes: Any) -> TrainConfig:
    return train_config_from({key: value for key, value in {**COMPLETE, **changes}.items() if value is not None})


def test_flags_of_megatron_are_there(tmp_path: Path) -> None:
    flags = (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --micro-batch-size 2 "
        "--global-batch-size 16 --seq-length 256 --train-iters 10 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
        "--lr-warmup-iters 2 --data-path 0.5 a 0.5 b --valid-data-path v --tokenizer-type SentencePieceTokenizer "
        "--tokenizer-model t --save s --load l --save-interval 5 --eval-interval 5 --eval-iters 1 --log-interval 1 "
        "--tensorboard-dir tb --bf16 --seed 7 --finetune --no-load-optim --no-load-rng --ckpt-step 5 "
        "--distributed-timeout-minutes 3 --exit-duration-in-mins 60 --clip-grad 1.0 --weight-decay 0.1 "
        "--recompute-granularity full --num-layers 4 --hidden-size 64 --num-attention-heads 4 --judge-model j"
    )
    loaded = load_train_config(flags.split())
    assert loaded.parallel.tensor_model_parallel_size == 2
    assert (loaded.engine.lr, loaded.engine.min_lr) == (1e-3, 1e-4)
    assert loaded.data.data_path == ("0.5", "a", "0.5", "b")
    assert loaded.model.bf16 and loaded.checkpoint.no_load_optim and loaded.training.seed == 7


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--lerning-rate", "--lr"), ("--learning_rate", "--lr"), ("--tp", "--tensor-model-parallel-size"),
        ("--batch-size", "--global-batch-size"), ("--max-steps", "--train-iters"), ("--output-dir", "--save"),
        ("--temprature", "--rollout-temperature"), ("--tensor-model-paralel-size", "--tensor-model-parallel-size"),
    ],
)  # fmt: skip
def test_names_of_other_programs_lead_to_megatrons(word: str, flag: str) -> None:
    with pytest.raises(ConfigurationError, match=f"unknown flag {word} \\(did you mean {flag}\\?\\)"):
        load_train_config([word, "1"])
    with pytest.raises(ConfigurationError, match=f"did you mean {flag[2:].replace('-', '_')}\\?"):
        config(**{word[2:].replace("-", "_"): 1})


def test_a_run_dir_holds_what_is_not_placed_elsewhere() -> None:
    plain, moved = config(), config(run_dir="a", save="b")
    assert (plain.checkpoint.save, plain.checkpoint.load, plain.observability.tensorboard_dir) == (None, None, None)
    assert (moved.checkpoint.save, moved.checkpoint.load) == ("b", "a/checkpoints")
    assert moved.observability.tensorboard_dir == "a/tensorboard"
    flags = (
        "--run-dir a --save none --load none --tensorboard-dir none --train-iters 1 --data-path d --tokenizer-model t"
    )
    none = load_train_config(
        [*flags.split(), "--tokenizer-model", "t", "--seq-length", "256", "--judge-model", "j", "--eval-iters", "0"]
    )
    assert (none.checkpoint.save, none.checkpoint.load, none.observability.tensorboard_dir) == (None, None, None)


def test_the_printed_configuration_gives_itself_back() -> None:
    first = config(curriculum="ntp:10; ntp=0.5,rollout=0.5", quality_settings={"repetition": 0.5}, clip_grad=0.5)
    assert train_config_from(parse_yaml(to_yaml(first), "printed")) == first


def test_folders_that_follow_the_run_dir_follow_it_in_a_printed_configuration_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(Path(__file__).parents[2] / "examples" / "recipes" / "quickstart.yaml")
    with pytest.raises(SystemExit):
        load_train_config(["--config", recipe, "--run-dir", "a", "--print-config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_train_config(["--config", str(printed)]).checkpoint.save == "a/checkpoints"
    moved = load_train_config(["--config", str(printed), "--run-dir", "b"])
    assert (moved.checkpoint.save, moved.checkpoint.load) == ("b/checkpoints", "b/checkpoints")
    assert moved.observability.tensorboard_dir == "b/tensorboard"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_iters": 0}, ["--train-iters is 0", "at least 1"]),
        ({"num_attention_heads": 6, "tensor_model_parallel_size": 4, "hidden_size": 96},
         ["--num-attention-heads 6", "--tensor-model-parallel-size 4"]),
        ({"num_attention_heads": 4, "num_query_groups": 1, "tensor_model_parallel_size": 2},
         ["--num-query-groups 1", "--tensor-model-parallel-size 2"]),
        ({"num_layers": 3, "pipeline_model_parallel_size": 2},
         ["--num-layers 3", "--pipeline-model-parallel-size 2"]),
        ({"pipeline_model_parallel_size": 2, "num_layers": 6, "num_layers_per_virtual_pipeline_stage": 2},
         ["--num-layers-per-virtual-pipeline-stage 2", "3 layers"]),
        ({"context_parallel_size": 2}, ["--context-parallel-size is 2", "Set it to 1"]),
        ({"expert_model_parallel_size": 2}, ["--expert-model-parallel-size is 2", "Set it to 1"]),
        ({"sequence_parallel": True}, ["--sequence-parallel", "--tensor-model-parallel-size"]),
        ({"suffix_length": 128}, ["--suffix-length 128", "--seq-length 128", "at most 127"]),
        ({"seq_length": 2048}, ["--seq-length 2048", "1024 positions", "--max-position-embeddings"]),
        ({"rollout_max_new_tokens": 33}, ["--rollout-max-new-tokens 33", "--suffix-length 32"]),
        ({"lr_warmup_iters": 100}, ["--lr-warmup-iters 100", "100 iterations"]),
        ({"data_path": None}, ["--data-path is missing"]),
        ({"valid_data_path": None}, ["--eval-iters", "--valid-data-path"]),
        ({"valid_data_path": None, "eval_iters": 0, "probe_interval": 5}, ["--probe-interval", "--valid-data-path"]),
        ({"valid_data_path": ["corpus"]}, ["--valid-data-path corpus is also in --data-path"]),
        ({"judge_data_path": ["corpus"]}, ["--judge-data-path corpus is also in --data-path"]),
        ({"tokenizer_model": None}, ["--tokenizer-model"]),
        ({"candidates": "suffix"}, ["--candidates suffix", "at least 2", "--preference-rule suffix"]),
        ({"candidates": "rollout:1", "preference_rule": "best", "objective": "rf_nll"},
         ["--candidates rollout:1", "at least 2", "--preference-rule rollout"]),
        ({"candidates": "suffix,rollout:2", "preference_rule": "rewrite>rollout"},
         ["--preference-rule rewrite>rollout needs a rewrite", "add rewrite"]),
        ({"preference_rule": "best"}, ["--objective online_dpo compares two", "--preference-rule best"]),
        ({"objective": "rf_nll"}, ["--objective rf_nll learns from one", "best_vs_worst", "--preference-rule best"]),
        ({"objective": "rf_nll", "preference_rule": "best", "reference_policy": "ema"},
         ["--reference-policy ema has no use", "rf_nll"]),
        ({"judge_model": None}, ["--judge-model is missing", "tools/fit_judge.py"]),
        ({"pair_schedule": "pivot", "candidates": "rollout:4"},
         ["--pair-schedule pivot compares with a suffix", "add suffix"]),
        ({"candidates": "suffix,rewrite", "curriculum": "ntp:9; rollout:9:win_rate=0.2"},
         ["waits for a win rate of rollouts", "add rollout:K"]),
        ({"candidates": "suffix,rollout", "preference_rule": "suffix>rollout", "probe_interval": 5},
         ["asks no judge", "drop --probe-interval"]),
        ({"curriculum": "ntp=0.5,rolout=0.5"}, ["unknown key 'rolout'", "rollout"]),
        ({"lookahead": 31}, ["--judge-queue 64", "--lookahead 31", "at least 66"]),
        ({"on_late_judgment": "fill"}, ["--on-late-judgment fill", "give a --run-dir"]),
        ({"finetune": True}, ["--finetune", "add --load DIR"]),
        ({"ckpt_step": 5}, ["--ckpt-step 5", "add --load DIR"]),
        ({"save_interval": 5}, ["--save-interval 5", "add --save DIR"]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 101}, ["--lr-wsd-decay-iters 101", "100 iterations"]),
        ({"recompute_granularity": "full", "num_layers": 4, "recompute_num_layers": 3},
         ["--recompute-num-layers 3", "4 layers", "divisor"]),
        ({"recompute_granularity": "full", "num_layers": 4, "pipeline_model_parallel_size": 2,
          "recompute_method": "block", "recompute_num_layers": 3}, ["--recompute-num-layers 3", "2 layers"]),
        ({"use_rope_scaling": True, "rope_scaling_factor": 0}, ["--rope-scaling-factor is 0", "above 0"]),
        ({"use_rope_scaling": True, "rope_low_freq_factor": 4.0}, ["--rope-low-freq-factor 4.0", "below"]),
        ({"init_method_std": -1}, ["--init-method-std is -1", "above 0"]),
        ({"rollout_temperature": 1e-9}, ["--rollout-temperature is 1e-09", "greedy"]),
        ({"rollout_temperature": 0, "candidates": "suffix,rollout:4"}, ["--rollout-temperature 0", "rollout:1"]),
        ({"candidates": "rollout:1000000000"}, ["rollout:1000000000", "1 to 4096"]),
        ({"data_path": ["nan", "a", "1", "b"]}, ["--data-path", "weight nan"]),
        ({"data_path": ["inf", "a", "1", "b"]}, ["--data-path", "weight inf"]),
        ({"valid_data_path": ["./x/../corpus"]}, ["--valid-data-path ./x/../corpus is also in --data-path"]),
        ({"data_seed": -1}, ["--data-seed is -1", "0 or more"]),
        ({"distributed_timeout_minutes": 10**9}, ["--distributed-timeout-minutes is 1000000000", "at most"]),
        ({"save": ""}, ["save is empty", "leave it out"]),
    ],
)  # fmt: skip
def test_sections_that_do_not_fit_are_one_line_with_value_and_remedy(changes: dict[str, Any], words: list[str]) -> None:
    config()
    with pytest.raises(ConfigurationError) as caught:
        config(**changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({"tensor_model_parallel_size": 2}, 3, ["3 ranks", "tensor 2 x pipeline 1"]),
        ({"micro_batch_size": 3, "curriculum": "ntp"}, 2,
         ["--global-batch-size 16", "data-parallel size 2 x --micro-batch-size 3 = 6"]),
        ({"rollout_micro_batch_size": 5}, 2,
         ["--global-batch-size 16", "data-parallel size 2 x --rollout-micro-batch-size 5 = 10"]),
        ({"global_batch_size": 12, "curriculum": "ntp=0.5,rollout=0.5", "rollout_micro_batch_size": 3,
          "micro_batch_size": 2}, 2, ["share 0.5 of rollout", "12 samples"]),
        ({"global_batch_size": 4, "curriculum": "ntp=0.9,rollout=0.1"}, 1, ["share 0.1 of rollout"]),
    ],
)  # fmt: skip
def test_batches_that_ranks_cannot_share_are_refused(
    changes: dict[str, Any], world_size: int, words: list[str]
) -> None:
    chosen = config(**changes)
    with pytest.raises(ConfigurationError) as caught:
        check_layout(chosen, world_size)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        # Tables 1, 2, 6, 7, 14 and 18 of the paper: every row of variants that it compares.
        {"curriculum": "ntp"},
        {"curriculum": "suffix"},
        {"curriculum": "rewrite"},
        {"candidates": "rollout:1", "preference_rule": "rollout", "objective": "rf_nll"},
        {"candidates": "rewrite,rollout:1", "preference_rule": "rewrite>rollout"},
        {"candidates": "rewrite,rollout:1", "preference_rule": "best", "objective": "rf_nll"},
        {"candidates": "suffix,rewrite", "preference_rule": "best", "objective": "rf_nll"},
        {"candidates": "suffix,rewrite,rollout:1", "preference_rule": "best", "objective": "rf_nll"},
        {"candidates": "suffix,rollout:1"},
        {"candidates": "rewrite,rollout:1"},
        *[{"candidates": f"suffix,rollout:{k}"} for k in (2, 4, 8, 16)],
        *[{"candidates": f"suffix,rewrite,rollout:{k}"} for k in (1, 16)],
        {"candidates": "rollout:16"},
        {"candidates": "suffix,rollout:16", "pair_schedule": "pivot"},
    ],
)
def test_every_variant_of_the_paper_is_a_valid_configuration(changes: dict[str, Any]) -> None:
    check_layout(config(**changes), 4)


def test_what_a_run_asks_of_its_teacher_follows_from_its_streams() -> None:
    assert not uses_judge(config(curriculum="ntp")) and not uses_rewriter(config(curriculum="ntp"))
    assert uses_judge(config(curriculum="ntp", probe_interval=5))
    assert uses_rewriter(config(curriculum="ntp=0.5,rewrite=0.5"))
    assert uses_rewriter(config(candidates="suffix,rewrite,rollout:1"))
    ordered = config(candidates="rewrite,rollout:1", preference_rule="rewrite>rollout", judge_model=None)
    assert not uses_judge(ordered) and uses_rewriter(ordered)


def test_what_is_missing_on_disk_is_listed_with_its_flag(tmp_path: Path) -> None:
    for name in ("corpus.bin", "corpus.idx", "held_out.bin", "tokenizer.model", "judge.npz"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    paths = {
        "data_path": [str(tmp_path / "corpus")],
        "valid_data_path": [str(tmp_path / "held_out")],
        "tokenizer_model": str(tmp_path / "tokenizer.model"),
        "judge_model": str(tmp_path / "judge.npz"),
    }
    chosen = config(**paths, load=str(tmp_path / "empty"))
    assert [line.split(":")[0] for line in find_missing(chosen)] == ["--valid-data-path"]
    with pytest.raises(ConfigurationError, match=r"--valid-data-path: no file .*held_out\.idx"):
        require_present(chosen)
    (tmp_path / "held_out.idx").touch()
    require_present(chosen)
    # A first start with --load is normal, but not if the run says that it needs what is there.
    fine_tuned = config(**paths, load=str(tmp_path / "empty"), finetune=True)
    assert find_missing(fine_tuned) == [f"--load: no checkpoint in {tmp_path / 'empty'}"]
    pretrained = config(**paths, pretrained_checkpoint=str(tmp_path / "nowhere"))
    [line] = find_missing(pretrained)
    where = tmp_path / "nowhere"
    assert line.startswith(f"--pretrained-checkpoint: no checkpoint in {where}; tools/convert_checkpoint.py")
    no_judge = replace(chosen, teacher=replace(chosen.teacher, judge_model=str(tmp_path / "none.npz")))
    assert find_missing(no_judge) == [f"--judge-model: no file {tmp_path / 'none.npz'}; fit it with tools/fit_judge.py"]


def test_places_that_cannot_be_written_and_files_in_place_of_folders_are_found_before_the_start(tmp_path: Path) -> None:
    for name in ("corpus.bin", "corpus.idx", "held_out.bin", "held_out.idx", "tokenizer.model", "judge.npz", "file"):
        (tmp_path / name).touch()
    file = str(tmp_path / "file")
    present = config(
        data_path=[str(tmp_path / "corpus")],
        valid_data_path=[str(tmp_path / "held_out")],
        tokenizer_model=str(tmp_path / "tokenizer.model"),
        judge_model=str(tmp_path / "judge.npz"),
    )
    assert find_missing(present) == []

    def missing(**changes: Any) -> list[str]:
        sections = {name: replace(getattr(present, name), **change) for name, change in changes.items()}
        return find_missing(replace(present, **sections))

    cannot = f"cannot be a directory, as {file} is a file; give another path"
    assert missing(checkpoint={"save": f"{file}/a/b"}) == [f"--save: {file}/a/b {cannot}"]
    assert missing(observability={"run_dir": file}) == [f"--run-dir: {file} {cannot}"]
    assert missing(observability={"tensorboard_dir": f"{file}/tb"}) == [f"--tensorboard-dir: {file}/tb {cannot}"]
    assert missing(teacher={"judge_ledger": f"{file}/ledger"}) == [f"--judge-ledger: {file} {cannot}"]
    for field, flag in (("load", "--load"), ("pretrained_checkpoint", "--pretrained-checkpoint")):
        [line] = missing(checkpoint={field: file})
        assert line.startswith(f"{flag}: {file} cannot be read (Not a directory)")
    [line] = missing(data={"data_path": (str(tmp_path / "corpus.bin"),)})
    assert line == f"--data-path {tmp_path}/corpus.bin: give the path without .bin, which names both files"
    [line] = missing(tokenizer={"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/nowhere/at/all"})
    assert line == "--tokenizer-model: nothing at /nowhere/at/all"
    assert missing(checkpoint={"save": str(tmp_path / "new" / "folder")}) == []


HOSTILE = (float("nan"), float("inf"), -1, 0, 1e18, 10**30, "", "x", "a\nb", [], ["x"], {"x": 1}, None, True)


@pytest.mark.parametrize("section", [section.name for section in read_schema(TrainConfig).sections])
def test_whatever_an_option_is_given_the_answer_is_a_configuration_or_one_line_that_names_it(section: str) -> None:
    answers = 0
    for option in next(s for s in read_schema(TrainConfig).sections if s.name == section).options:
        for value in HOSTILE:
            try:
                train_config_from({**COMPLETE, option.name: value})
            except ConfigurationError as error:
                answers += 1
                assert "\n" not in str(error) and len(str(error)) > 20, (option.name, value)
    assert answers > 5
