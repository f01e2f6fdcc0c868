"""What the sections of a configuration must agree on, before any process group starts.

``check_sections`` needs nothing but the configuration, ``check_layout`` the world size, ``find_missing`` the disk.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sip.checkpoint.layout import resolve
from megatron_sip.curriculum import Curriculum
from megatron_sip.data.config import parse_blend
from megatron_sip.engine import LearningRate
from megatron_sip.errors import CheckpointError, ConfigurationError
from megatron_sip.teacher.ledger.files import segments

if TYPE_CHECKING:
    from megatron_sip.checkpoint.config import CheckpointConfig
    from megatron_sip.model.config import ModelConfig
    from megatron_sip.observability.config import ObservabilityConfig
    from megatron_sip.teacher.config import TeacherConfig
    from megatron_sip.tokenizer.config import TokenizerConfig
    from megatron_sip.train.config import TrainConfig

_PATH_OPTIONS = ("data_path", "valid_data_path", "test_data_path", "judge_data_path", "second_judge_data_path")
_TRAINING_PATHS = ("data_path", "valid_data_path")
"""Those that a training run opens itself; tools open the others."""
_WAITING_MARGIN_S = 30.0
"""For what a rank does beside waiting for a rollout server, until it meets the others again."""
_TOKENIZER_PACKAGES = {
    "SentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "transformers",
    "TikTokenizer": "tiktoken",
}


def check_sections(config: TrainConfig) -> None:
    """Raise ConfigurationError for sections that do not fit each other."""
    _check_model(config)
    _check_schedule(config)
    _check_data(config)
    if trains_on(config, "rollout"):
        _check_candidates(config)
        _check_objective(config)
        _check_servers(config)
    _check_judge(config)


def check_layout(config: TrainConfig, world_size: int) -> Curriculum:
    """Raise ConfigurationError unless ``world_size`` ranks can share the work; returns the curriculum for them."""
    training = config.training
    dp = config.parallel.data_parallel_size(world_size)
    for stream, flag in (("ntp", "micro-batch-size"), ("default", "rollout-micro-batch-size")):
        rows = training.stream_micro_batch_sizes[stream]
        is_used = trains_on(config, "ntp") if stream == "ntp" else _trains_on_suffixes(config)
        if is_used and training.global_batch_size % (dp * rows):
            raise ConfigurationError(
                f"--global-batch-size {training.global_batch_size} is not divisible by data-parallel size {dp} x "
                f"--{flag} {rows} = {dp * rows}: make it a multiple of {dp * rows}, or change the micro-batch size or "
                f"the {world_size} ranks"
            )
    return Curriculum(config.curriculum, training.global_batch_size, dp, training.stream_micro_batch_sizes)


def trains_on(config: TrainConfig, stream: str) -> bool:
    """Whether some phase of the curriculum trains on ``stream``."""
    return any(phase.shares[stream] > 0 for phase in config.curriculum.parsed())


def uses_judge(config: TrainConfig) -> bool:
    """Whether the run ever asks the judge: to choose, for a trigger, or in a probe."""
    judged = trains_on(config, "rollout") and config.preference.needs_judge
    return judged or _has_trigger(config) or config.training.probe_interval > 0


def reference_policy(config: TrainConfig) -> str:
    """--reference-policy, or none where no phase of the curriculum compares with it: a copy costs memory."""
    used = config.objective.needs_reference and trains_on(config, "rollout")
    return config.objective.reference_policy if used else "none"


def uses_rewriter(config: TrainConfig) -> bool:
    """Whether the run ever asks for rewrites."""
    return trains_on(config, "rewrite") or (config.rollout.pool.rewrite and trains_on(config, "rollout"))


def find_missing(config: TrainConfig) -> list[str]:
    """What the run needs and this machine lacks: files, packages, checkpoints, places to write. One line each."""
    return [
        *_missing_corpora(config),
        *missing_tokenizer(config.tokenizer),
        *missing_kernels(config.model),
        *missing_teacher(config.teacher, uses_judge(config), uses_rewriter(config)),
        *missing_checkpoints(config.checkpoint),
        *unwritable(config.checkpoint, config.observability, config.teacher.judge_ledger),
    ]


def require_present(config: TrainConfig) -> None:
    """Raise ConfigurationError for the first thing that ``find_missing`` finds."""
    require_none(find_missing(config))


def require_none(missing: Sequence[str]) -> None:
    """Raise ConfigurationError for the first of what is missing."""
    if missing:
        more = f" (and {len(missing) - 1} more: --dry-run lists all)" if len(missing) > 1 else ""
        raise ConfigurationError(missing[0] + more)


def _has_trigger(config: TrainConfig) -> bool:
    return any(phase.wait_for is not None for phase in config.curriculum.parsed())


def _trains_on_suffixes(config: TrainConfig) -> bool:
    return any(trains_on(config, stream) for stream in ("suffix", "rewrite", "rollout"))


def _check_model(config: TrainConfig) -> None:
    model, parallel = config.model.resolve(), config.parallel
    config.model.validate_tensor_parallel(parallel.tensor_model_parallel_size)
    virtual_stages = parallel.num_virtual_stages(model.num_layers) or 1
    config.model.validate_recompute(model.num_layers // parallel.pipeline_model_parallel_size // virtual_stages)
    if config.data.seq_length > model.max_position_embeddings:
        raise ConfigurationError(
            f"--seq-length {config.data.seq_length} is more than the {model.max_position_embeddings} positions of the "
            "model: lower it or raise --max-position-embeddings"
        )


def _check_schedule(config: TrainConfig) -> None:
    training = config.training
    LearningRate.of(config.engine, training.train_iters)
    longest = config.rollout.rollout_max_new_tokens
    if longest is not None and longest > config.data.suffix_length:
        raise ConfigurationError(
            f"--rollout-max-new-tokens {longest} is more than the candidate block of --suffix-length "
            f"{config.data.suffix_length}: lower it or raise --suffix-length"
        )
    _check_lookahead(config)


def _check_lookahead(config: TrainConfig) -> None:
    training, queue = config.training, config.teacher.judge_queue
    # A batch ahead has a judge's ticket and a rewriter's; a probe, the state for a checkpoint and a repeat come on top.
    drawn = training.rewrite_lookahead if uses_rewriter(config) else 0
    needed = 2 * training.lookahead + drawn + 4
    if (training.lookahead or drawn > 1) and queue < needed:
        raise ConfigurationError(
            f"--judge-queue {queue} is too short for --lookahead {training.lookahead} and --rewrite-lookahead {drawn}: "
            f"give at least {needed}"
        )
    if training.lookahead and training.reference_scoring == "early":
        raise ConfigurationError(
            f"--reference-scoring early has no use with --lookahead {training.lookahead}, where verdicts do not keep a "
            "step waiting: leave it out"
        )
    fills = training.on_late_judgment == "fill"
    if fills and config.observability.run_dir is None:
        raise ConfigurationError("--on-late-judgment fill records its decisions in metrics.jsonl: give a --run-dir")
    if training.replay_fills and not fills:
        raise ConfigurationError("--replay-fills repeats fills: add --on-late-judgment fill")


def _check_data(config: TrainConfig) -> None:
    data, training = config.data, config.training
    if not data.data_path:
        raise ConfigurationError("--data-path is missing: name a corpus, as tools/preprocess_data.py writes them")
    wants_validation = training.eval_iters > 0 and training.eval_interval > 0
    if wants_validation and not data.valid_data_path:
        raise ConfigurationError(
            f"--eval-iters {training.eval_iters} needs a --valid-data-path: name one, or give --eval-iters 0"
        )
    if (training.probe_interval > 0 or _has_trigger(config)) and not data.valid_data_path:
        raise ConfigurationError(
            "probes (--probe-interval, or a phase that waits for a win rate) need held-out prefixes: give "
            "--valid-data-path"
        )
    trained = {os.path.realpath(path) for path in parse_blend(data.data_path)[0]}
    for name in _PATH_OPTIONS[1:]:
        flag = f"--{name.replace('_', '-')}"
        for path in parse_blend(getattr(data, name), flag)[0]:
            if os.path.realpath(path) in trained:
                raise ConfigurationError(
                    f"{flag} {path} is also in --data-path: split the corpus, or what is learned is what is tested"
                )


def _check_candidates(config: TrainConfig) -> None:
    pool, preference = config.rollout.pool, config.preference
    kinds = {kind.value for kind in pool.kinds}
    for kind in preference.fixed_order:
        if kind.value not in kinds:
            raise ConfigurationError(
                f"--preference-rule {preference.preference_rule} needs a {kind.value}, but --candidates are {pool}: "
                f"add {kind.value}"
            )
    if preference.needs_judge and pool.num_candidates < 2:
        raise ConfigurationError(
            f"--candidates {pool} leaves a judge nothing to choose from: name at least 2, or learn from the one by "
            f"--preference-rule {min(kinds)}"
        )
    if pool.num_rollouts > 1 and config.rollout.sampling.greedy:
        raise ConfigurationError(
            f"--rollout-temperature 0 makes the {pool.num_rollouts} rollouts of --candidates {pool} the same: give "
            "rollout:1, or a temperature above 0"
        )


def _check_servers(config: TrainConfig) -> None:
    """While one rank waits for rollout servers the others wait in a collective, which fails the job when it ends."""
    minutes = config.parallel.distributed_timeout_minutes
    if config.rollout.rollout_engine == "in_process":
        return
    for name in ("rollout_sync_timeout_s", "rollout_give_up_s"):
        seconds = getattr(config.rollout, name)
        if seconds + _WAITING_MARGIN_S > 60 * minutes:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} {seconds:g} is too long for --distributed-timeout-minutes {minutes}, "
                f"after which ranks that wait give up: lower it to {60 * minutes - _WAITING_MARGIN_S:g}, or give "
                f"--distributed-timeout-minutes {math.ceil((seconds + _WAITING_MARGIN_S) / 60)}"
            )


def _check_objective(config: TrainConfig) -> None:
    objective, preference = config.objective, config.preference
    if objective.objective == "online_dpo" and preference.num_candidates != 2:
        raise ConfigurationError(
            f"--objective online_dpo compares two candidates, but --preference-rule {preference.preference_rule} keeps "
            "one: give --preference-rule best_vs_worst (or a fixed order A>B), or --objective rf_nll"
        )
    if objective.objective == "rf_nll" and preference.num_candidates != 1:
        raise ConfigurationError(
            f"--objective rf_nll learns from one candidate, but --preference-rule {preference.preference_rule} keeps "
            "two: give --preference-rule best (or one kind), or --objective online_dpo"
        )
    if objective.objective == "rf_nll" and objective.reference_policy in ("synced", "ema"):
        raise ConfigurationError(
            f"--reference-policy {objective.reference_policy} has no use with --objective rf_nll: leave it out"
        )


def _check_judge(config: TrainConfig) -> None:
    kinds = {kind.value for kind in config.rollout.pool.kinds}
    teacher = config.teacher
    embedded = teacher.teacher == "embedded"
    modelled = uses_judge(config) and embedded and teacher.judge_quality_weight and not teacher.replay_judgments
    if modelled and not teacher.judge_model:
        raise ConfigurationError(
            "--judge-model is missing: fit the quality judge with tools/fit_judge.py, or give --judge-quality-weight 0"
        )
    if uses_judge(config) and teacher.pair_schedule == "pivot" and teacher.pair_pivot not in kinds:
        raise ConfigurationError(
            f"--pair-schedule pivot compares with a {teacher.pair_pivot}, but --candidates are {config.rollout.pool}: "
            f"add {teacher.pair_pivot}, or give another --pair-pivot"
        )
    if _has_trigger(config) and "rollout" not in kinds:
        raise ConfigurationError(
            f"a phase waits for a win rate of rollouts, but --candidates are {config.rollout.pool}: add rollout:K"
        )
    if (_has_trigger(config) or config.training.probe_interval > 0) and not config.preference.needs_judge:
        raise ConfigurationError(
            f"--preference-rule {config.preference.preference_rule} asks no judge, so that no probe can find who wins: "
            "drop --probe-interval and wait_for, or give best_vs_worst or best"
        )


def _missing_corpora(config: TrainConfig) -> Iterator[str]:
    for name in _TRAINING_PATHS:
        flag = f"--{name.replace('_', '-')}"
        for prefix in parse_blend(getattr(config.data, name), flag)[0]:
            if Path(prefix).suffix in (".bin", ".idx") and Path(prefix).is_file():
                yield f"{flag} {prefix}: give the path without {Path(prefix).suffix}, which names both files"
                continue
            lacking = [suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
            if lacking:
                yield f"{flag}: no file {prefix}{' and '.join(lacking)}; tools/preprocess_data.py writes them"


def missing_tokenizer(tokenizer: TokenizerConfig) -> Iterator[str]:
    """The tokenizer's file or package, if it is not at hand."""
    package = _TOKENIZER_PACKAGES.get(tokenizer.tokenizer_type)
    if package is not None and importlib.util.find_spec(package) is None:
        yield f"--tokenizer-type {tokenizer.tokenizer_type}: package {package} is not installed; pip install {package}"
    path = tokenizer.tokenizer_model if tokenizer.tokenizer_type != "NullTokenizer" else None
    if path is None:
        return
    if tokenizer.tokenizer_type != "HuggingFaceTokenizer":
        if not Path(path).is_file():
            yield f"--tokenizer-model: no file {path}"
    # A Hugging Face tokenizer may also be a name that its library knows.
    elif path.startswith(("/", "./", "../", "~")) and not Path(path).exists():
        yield f"--tokenizer-model: nothing at {path}"


def missing_kernels(model: ModelConfig) -> Iterator[str]:
    """Transformer Engine, where it is asked for and not installed."""
    if model.transformer_impl == "transformer_engine" and not importlib.util.find_spec("transformer_engine"):
        yield (
            "--transformer-impl transformer_engine: Transformer Engine is not installed; use NVIDIA's PyTorch image, "
            "or --transformer-impl auto"
        )


def missing_teacher(teacher: TeacherConfig, judging: bool, rewriting: bool) -> Iterator[str]:
    """Endpoints, checkpoints, files and packages of whom is asked."""
    roles = teacher.http_roles(judging, rewriting)
    yield from teacher.missing_http(roles, replaying=bool(teacher.replay_judgments))
    if teacher.replay_judgments and not segments(Path(teacher.replay_judgments)):
        yield f"--replay-judgments: no ledger at {teacher.replay_judgments}; give the --judge-ledger of a run"
    yield from teacher.missing_models(judging, rewriting)
    if roles and importlib.util.find_spec("aiohttp") is None:
        yield "--teacher http: package aiohttp is not installed; pip install aiohttp"
    judges = judging and teacher.teacher == "embedded" and teacher.judge_quality_weight > 0
    if judges and teacher.judge_model and not teacher.replay_judgments and not Path(teacher.judge_model).is_file():
        yield f"--judge-model: no file {teacher.judge_model}; fit it with tools/fit_judge.py"
    if teacher.safety_words and not Path(teacher.safety_words).is_file():
        yield f"--safety-words: no file {teacher.safety_words}"


def missing_checkpoints(checkpoint: CheckpointConfig) -> Iterator[str]:
    """Checkpoints that a run cannot start without."""
    wanted = []
    if checkpoint.load is not None:
        required = checkpoint.finetune or checkpoint.exit_on_missing_checkpoint or checkpoint.ckpt_step is not None
        wanted.append(("--load", checkpoint.load, checkpoint.ckpt_step, required))
    if checkpoint.pretrained_checkpoint is not None:
        wanted.append(("--pretrained-checkpoint", checkpoint.pretrained_checkpoint, None, True))
    for flag, directory, step, required in wanted:
        found, problem = _find_checkpoint(flag, directory, step)
        if problem:
            yield problem
        elif found is None and required:
            hint = f"; tools/convert_checkpoint.py to-megatron HF_DIR {directory} makes one of Hugging Face weights"
            yield f"{flag}: no checkpoint in {directory}{hint if flag == '--pretrained-checkpoint' else ''}"


def missing_policy(flag: str, directory: str, step: int | None, step_flag: str) -> Iterator[str]:
    """A checkpoint that a tool has under flags of its own."""
    found, problem = _find_checkpoint(flag, directory, step)
    if problem:
        yield problem.replace("--ckpt-step", step_flag)
    elif found is None:
        yield f"{flag}: no checkpoint in {directory}; give the folder that a run wrote by --save"


def _find_checkpoint(flag: str, directory: str, step: int | None) -> tuple[Path | None, str]:
    """The whole checkpoint, if there is one, and what is wrong with it, if anything is."""
    try:
        return resolve(Path(directory), step), ""
    except CheckpointError as error:
        return None, f"{flag}: {error}"
    except OSError as error:
        return None, f"{flag}: {directory} cannot be read ({error.strerror}): give the directory of a run's checkpoints"


def unwritable(checkpoint: CheckpointConfig, observability: ObservabilityConfig, ledger: str) -> Iterator[str]:
    """Folders of results that cannot be made, or written to: a run should not find out at its first save."""
    folders = {
        "--save": checkpoint.save,
        "--run-dir": observability.run_dir,
        "--tensorboard-dir": observability.tensorboard_dir,
    }
    if ledger:
        folders["--judge-ledger"] = str(Path(ledger).parent)
    for flag, folder in folders.items():
        if folder is None:
            continue
        there = Path(folder).absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            yield f"{flag}: {folder} cannot be a directory, as {there} is a file; give another path"
        elif not os.access(there, os.W_OK | os.X_OK):
            yield f"{flag}: {folder} cannot be written, as {there} is not ours to write in; give another path"
