"""TRL's side of benchmarks/sip_step.py: its online-DPO trainer, stepped from outside. Runs in TRL's environment.

The settings are those that a user who knows the library would take on a CPU: SDPA, its own ``generate`` with the
key-value cache, fused AdamW, no gradient checkpointing, no padding, all prompts of a step in one batch, one call of the
reward function a step. The trainer's methods are timed, not changed.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from benchmarks.sip_step_task import (
    ADAM_BETAS,
    ADAM_EPSILON,
    CHECKED_STEPS,
    CLIP_NORM,
    DPO_BETA,
    LEARNING_RATE,
    SEED,
    TEMPERATURE,
    WEIGHT_DECAY,
    GivenWork,
    StepReport,
    Task,
    given_completions,
    preference_of,
    profile_of,
    text_of,
)

PACKAGES = "trl", "transformers", "torch", "accelerate"
END = "<end>"


def training_step(payload: dict[str, Any]) -> Callable[[], StepReport]:
    """A target of ``pairs.Side``: each call is one whole step of ``OnlineDPOTrainer.train``, logging included.

    ``payload``: ``task``; ``arguments`` override the trainer's.
    """
    trainer = _trainer(payload["task"], False, payload.get("arguments", {}))
    stepper = _Stepper(trainer)
    trainer.add_callback(stepper)
    return stepper.step


def profile(payload: dict[str, Any]) -> Callable[[], str]:
    """A target of ``pairs.Side``: a table of a step's CPU time."""
    step = training_step(payload)
    return lambda: profile_of(step)


def given_work(payload: dict[str, Any]) -> Callable[[], GivenWork]:
    """A target of ``pairs.Side``: what the trainer makes of given completions."""
    task: Task = payload["task"]
    trainer = _trainer(task, given=True, arguments={})
    prefix = task.all_prompts()[0]
    completions = torch.from_numpy(given_completions(task, prefix))
    prompts = torch.from_numpy(prefix).expand(len(completions), -1)

    def run() -> GivenWork:
        with torch.no_grad():
            ones = torch.ones_like(prompts), torch.ones_like(completions)
            found = trainer._forward(trainer.model, prompts, ones[0], completions, ones[1])
        stepper = _Stepper(trainer)
        trainer.add_callback(stepper)
        return GivenWork(found.tolist(), [stepper.step() for _ in range(CHECKED_STEPS)])

    return run


def versions(payload: dict[str, Any]) -> Callable[[], dict[str, str]]:
    """A target of ``pairs.Side``: what this environment has."""
    return lambda: {name: importlib.metadata.version(name) for name in PACKAGES}


def _trainer(task: Task, given: bool, arguments: dict[str, Any]) -> _TimedTrainer:
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's use of its own dependencies
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = LlamaForCausalLM.from_pretrained(task.model_folder, dtype=torch.float32, attn_implementation="sdpa")
    settings: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "use_cpu": True,
        "bf16": task.bf16,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": task.prompts,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "max_steps": task.num_steps,
        "max_new_tokens": task.new_tokens,
        "max_length": task.prefix + task.new_tokens,
        "temperature": TEMPERATURE,
        "beta": DPO_BETA,
        "optim": "adamw_torch_fused",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "adam_epsilon": ADAM_EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP_NORM,
        "cache_implementation": "static",
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    texts = [text_of(prompt) for prompt in task.all_prompts()]
    trainer = _TimedTrainer(
        model=model,
        reward_funcs=_Judge(task.judge_s),
        args=OnlineDPOConfig(**{**settings, **arguments}),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=_tokenizer(task.vocab_size),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.given = task if given else None
    return trainer


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Numbers as words. The end token lies beyond the model's vocabulary, so that no completion ends early."""
    words = {str(number): number for number in range(vocab_size)} | {END: vocab_size}
    tokenizer = Tokenizer(WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


class _Judge:
    """TRL's reward function: asked once a step for all completions, it answers after ``judge_s``."""

    __name__ = "judge"

    def __init__(self, judge_s: float) -> None:
        self._judge_s = judge_s

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **rest: Any) -> list[float]:
        if self._judge_s:
            time.sleep(self._judge_s)
        # Ranks, as a float32 holds no digest: the trainer compares the two halves of the list place by place.
        half = len(completions) // 2
        first, second = ([preference_of(text) for text in part] for part in (completions[:half], completions[half:]))
        wins = [float(a > b) for a, b in zip(first, second, strict=True)]
        return wins + [1.0 - win for win in wins]


class _TimedTrainer(OnlineDPOTrainer):
    """TRL's trainer with a clock on its parts."""

    given: Task | None = None

    def __init__(self, **options: Any) -> None:
        self.phases_s: dict[str, float] = defaultdict(float)
        self.loss = math.nan
        self.sizes = (0, 0, 0)
        self.trained_at = 0.0
        super().__init__(**options)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.phases_s[phase] += time.perf_counter() - started

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with self._timed("all"):
            loss: torch.Tensor = super().training_step(*arguments, **options)
        self.loss = float(loss)
        inside = sum(self.phases_s[phase] for phase in ("rollout", "reference", "judge"))
        self.phases_s["train"] = self.phases_s.pop("all") - inside
        self.trained_at = time.perf_counter()
        return loss

    def _generate(self, model: Any, prompts: Any, images: Any = None) -> Any:
        with self._timed("rollout"):
            found = super()._generate(model, prompts, images)
        prompt_ids, prompt_mask, completion_ids, completion_mask, vision = found
        self.sizes = len(prompts), int(prompt_mask[: len(prompts)].sum()), int(completion_mask.sum())
        if self.given is None:
            return found
        own = [given_completions(self.given, row.numpy()) for row in prompt_ids[: len(prompts)]]
        # The trainer's order: all prompts' first completions, then all second ones.
        given = torch.from_numpy(np.stack(own, axis=1).reshape(completion_ids.shape))
        return prompt_ids, prompt_mask, given, completion_mask, vision

    def _forward(self, model: Any, *inputs: Any) -> Any:
        if model is not self.ref_model:
            return super()._forward(model, *inputs)
        with self._timed("reference"):
            return super()._forward(model, *inputs)

    def _calculate_rewards_from_functions(self, *arguments: Any, **options: Any) -> Any:
        with self._timed("judge"):
            return super()._calculate_rewards_from_functions(*arguments, **options)


class _Stepper(TrainerCallback):
    """Lets ``train`` run in a thread of its own, one step at a time: from one log to the next."""

    def __init__(self, trainer: _TimedTrainer) -> None:
        self._trainer = trainer
        self._may_go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._logs: dict[str, float] = {}
        self._failure: BaseException | None = None
        threading.Thread(target=self._train, daemon=True).start()

    def step(self) -> StepReport:
        """Waits until the trainer has done its next step."""
        self._trainer.phases_s.clear()
        started = time.perf_counter()
        self._may_go.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure
        phases_s = dict(self._trainer.phases_s)
        phases_s["rest"] = time.perf_counter() - started - sum(phases_s.values())
        logs = self._logs
        return StepReport(self._trainer.loss, logs["logps/chosen"], logs["grad_norm"], phases_s, *self._trainer.sizes)

    def _train(self) -> None:
        self._may_go.acquire()
        try:
            self._trainer.train()
        except BaseException as failure:
            self._failure = failure
        self._done.release()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._trainer.phases_s["optimizer"] = time.perf_counter() - self._trainer.trained_at

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **options: Any) -> None:
        self._logs = dict(logs)
        self._done.release()
        self._may_go.acquire()
