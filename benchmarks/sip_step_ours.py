"""Our side of benchmarks/sip_step.py: the trainer of a run as pretrain_sip.py builds it, one step at a time.

The teacher is a process of its own with the real panel and a judge that answers after a given time
(benchmarks/slow_teacher.py); everything else is what a recipe gives.
"""

from __future__ import annotations

import atexit
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sip_step_task import (
    ADAM_BETAS,
    ADAM_EPSILON,
    CHECKED_STEPS,
    CLIP_NORM,
    DPO_BETA,
    LEARNING_RATE,
    NUM_ROLLOUTS,
    SEED,
    TEMPERATURE,
    WEIGHT_DECAY,
    GivenWork,
    StepReport,
    Task,
    given_completions,
    profile_of,
    save_model,
)
from megatron_sip.checkpoint import StopSignals
from megatron_sip.checkpoint.huggingface import to_megatron
from megatron_sip.data.build import SUFFIX, build_loader
from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.distributed import initialize
from megatron_sip.engine.engine import POLICY
from megatron_sip.preference.rows import Row, RowShape, build_rows
from megatron_sip.rollout import GenerationRequest
from megatron_sip.teacher import TeacherProcess
from megatron_sip.tokenizer import build_tokenizer
from megatron_sip.train import build
from megatron_sip.train.config import TrainConfig, train_config_from
from megatron_sip.train.trainer import Trainer
from megatron_sip.types import Candidate, CandidateKind

_TIMERS = "rollout", "reference", "train", "optimizer"
"""Of ours, those that are phases of a report."""


def prepare(task: Task) -> None:
    """Writes the model, a corpus and the prompts in the order in which a run draws them."""
    save_model(task)
    to_megatron(task.model_folder, task.megatron_folder)
    config = train_config_from(_recipe(task, "corpus"))
    tokenizer = build_tokenizer(config.tokenizer)
    random = np.random.default_rng(SEED)
    with IndexedWriter(str(_corpus(task)), tokenizer.vocab_size) as writer:
        for _ in range(task.num_steps * task.prompts):
            writer.add_document(random.integers(0, task.vocab_size - 1, task.prefix + task.new_tokens))
        writer.close(
            CorpusMeta(
                tokenizer_fingerprint=tokenizer.fingerprint,
                tokenizer_type="NullTokenizer",
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                append_eod=False,
                num_documents=writer.num_documents,
                num_tokens=writer.num_tokens,
            )
        )
    loader = build_loader(config.data, config.data.data_path, tokenizer, SEED, [SUFFIX])
    samples = loader.take(SUFFIX, task.num_steps * task.prompts, 0, 1)
    task.save_all_prompts(np.stack([sample.prefix for sample in samples]))


def training_step(payload: dict[str, Any]) -> Callable[[], StepReport]:
    """A target of ``pairs.Side``: each call is one step of the trainer, its log included.

    ``payload``: ``task``; ``lookahead``; ``changes`` to the recipe.
    """
    return _stepper(*_trainer(payload, f"steps-{payload.get('lookahead', 0)}"))


def _stepper(config: TrainConfig, trainer: Trainer) -> Callable[[], StepReport]:
    assert config.observability.run_dir is not None
    metrics = Path(config.observability.run_dir) / "metrics.jsonl"
    trainer._record.open(0)
    tokens_before = 0

    def step() -> StepReport:
        nonlocal tokens_before
        started = time.perf_counter()
        trainer._one_step()
        took_s = time.perf_counter() - started
        record = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
        tokens, tokens_before = round(record["tokens"]) - tokens_before, round(record["tokens"])
        return _report(record, took_s, tokens)

    return step


def profile(payload: dict[str, Any]) -> Callable[[], str]:
    """A target of ``pairs.Side``: a table of a step's CPU time."""
    step = training_step(payload)
    return lambda: profile_of(step)


def given_work(payload: dict[str, Any]) -> Callable[[], GivenWork]:
    """A target of ``pairs.Side``: what the engine and the trainer make of given completions."""
    task: Task = payload["task"]
    config, trainer = _trainer(payload, "given")
    trainer._queue._preparer.rollouts = _GivenRollouts(task)
    prefix = task.all_prompts()[0]
    row = Row(prefix, tuple(given_completions(task, prefix)))
    batches = build_rows([row], RowShape(micro_batch_size=1, candidate_block=task.new_tokens), NUM_ROLLOUTS)

    def run() -> GivenWork:
        (scored,) = trainer._engine.score(batches, which=POLICY)
        step = _stepper(config, trainer)
        rows = scored.reshape(NUM_ROLLOUTS, task.new_tokens).tolist()
        return GivenWork(rows, [step() for _ in range(CHECKED_STEPS)])

    return run


def _trainer(payload: dict[str, Any], run: str) -> tuple[TrainConfig, Trainer]:
    """Lives as long as the process."""
    task: Task = payload["task"]
    ahead = payload.get("lookahead", 0)
    # Both rollouts are trained on, so that the reference may as well score them while the judge works.
    changes = {"lookahead": ahead, "reference_scoring": "late" if ahead else "early", **payload.get("changes", {})}
    config = train_config_from({**_recipe(task, run), **changes})
    context = initialize(config.parallel, config.training.seed)

    def slow_teacher(config: TrainConfig, tokenizer: Any, context: Any) -> TeacherProcess:
        factory = "benchmarks.slow_teacher:build"
        return TeacherProcess(config.teacher, {"round_s": (task.judge_s,)}, factory=factory)

    build.start_teacher = slow_teacher
    signals = _HELD.enter_context(StopSignals())
    trainer = _HELD.enter_context(build.build_trainer(config, context, signals))
    trainer.load()
    return config, trainer


_HELD = ExitStack()
"""What the side's process holds until it ends."""
atexit.register(_HELD.close)


class _GivenRollouts:
    """In place of the rollout engine."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Candidate]]:
        return [
            [
                Candidate(CandidateKind.ROLLOUT, tokens, number)
                for number, tokens in enumerate(given_completions(self._task, request.prefix))
            ]
            for request in requests
        ]

    def sync_weights(self, version: int) -> None:
        pass


def _report(record: dict[str, Any], took_s: float, tokens: int) -> StepReport:
    """``tokens``: of the rows that were trained on, a pair's prefix counted once."""
    phases_s = {name: record.get(f"timing/{name}_s", 0.0) for name in _TIMERS}
    phases_s["judge"] = record["judge/exposed_wait_s"]
    phases_s["rest"] = took_s - sum(phases_s.values())
    prompts = round(record["batch-size"])
    new_tokens = round(record["rollout/length"] * prompts * NUM_ROLLOUTS)
    return StepReport(
        loss=record["loss/dpo"],
        chosen_log_prob=record["logps/chosen"],
        grad_norm=record["grad-norm"],
        phases_s=phases_s,
        num_prompts=prompts,
        prefix_tokens=tokens - new_tokens,
        new_tokens=new_tokens,
    )


def _corpus(task: Task) -> Path:
    return Path(task.folder) / "corpus"


def _recipe(task: Task, run: str) -> dict[str, Any]:
    """Next-token rows are off, as TRL's trainer has none."""
    heads = max(1, task.hidden // 64)
    return {
        "num_layers": task.layers,
        "hidden_size": task.hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "ffn_hidden_size": 64 * round(task.hidden * 8 / 3 / 64),
        "kv_channels": task.hidden // heads,
        "max_position_embeddings": task.prefix + task.new_tokens,
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 1,
        "bf16": task.bf16,
        "pretrained_checkpoint": str(task.megatron_folder),
        "train_iters": 10**6,
        "global_batch_size": task.prompts,
        "micro_batch_size": task.prompts,
        "phases": [{"name": "all", "rollout": 1.0}],
        "candidates": f"rollout:{NUM_ROLLOUTS}",
        "rollout_temperature": TEMPERATURE,
        "rollout_stop_at_eod": False,
        # For the checks of the configuration: the judge is put in by ``_trainer``.
        "teacher": "http",
        "judge_endpoints": ["http://127.0.0.1:1/v1"],
        "judge_served_model": "slow",
        "pair_order": "fixed",
        "reference_policy": "frozen",
        "objective": "online_dpo",
        "dpo_beta": DPO_BETA,
        "lr": LEARNING_RATE,
        "lr_decay_style": "constant",
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "adam_eps": ADAM_EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "clip_grad": CLIP_NORM,
        "seed": SEED,
        "data_path": [str(_corpus(task))],
        "seq_length": task.prefix + task.new_tokens,
        "suffix_length": task.new_tokens,
        "min_prefix_length": task.prefix,
        "sample_cut": "last",
        "tokenizer_type": "NullTokenizer",
        "vocab_size": task.vocab_size - 1,
        "eval_interval": 0,
        "log_interval": 10**6,
        "run_dir": str(Path(task.folder) / run),
        "save": None,
        "load": None,
    }
