"""What both sides of benchmarks/sip_step.py work on. Imported in TRL's environment too: torch and transformers only.

Prompts are random token ids, all of one length, so that neither side pads. A completion never ends early: the
vocabulary of the model has no end token for TRL, and ours samples through it (``--no-rollout-stop-at-eod``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]

LEARNING_RATE = 1e-4
ADAM_BETAS = 0.9, 0.95
ADAM_EPSILON = 1e-8
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
DPO_BETA = 0.1
TEMPERATURE = 1.0
SEED = 1234
NUM_ROLLOUTS = 2
"""K: what TRL's trainer generates."""
CHECKED_STEPS = 3


@dataclass(frozen=True)
class Task:
    """One online-DPO run; lengths in tokens."""

    folder: str
    """With ``model`` (transformers' format), ``megatron`` (ours) and ``prompts.npy``."""
    hidden: int
    layers: int
    vocab_size: int
    prefix: int
    new_tokens: int
    prompts: int
    """Of a step."""
    num_steps: int
    """For which there are prompts."""
    bf16: bool = False
    judge_s: float = 0.0
    """From a batch's submission to its verdicts."""

    @property
    def model_folder(self) -> Path:
        return Path(self.folder) / "model"

    @property
    def megatron_folder(self) -> Path:
        return Path(self.folder) / "megatron"

    def all_prompts(self) -> IntArray:
        """int64 [num_steps * prompts, prefix], in the order in which both sides meet them."""
        prompts: IntArray = np.load(Path(self.folder) / "prompts.npy")
        return prompts

    def save_all_prompts(self, prompts: IntArray) -> None:
        np.save(Path(self.folder) / "prompts.npy", prompts)


def save_model(task: Task) -> None:
    """The weights that both sides start from, as transformers initialises a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    heads = max(1, task.hidden // 64)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=task.hidden,
        intermediate_size=64 * round(task.hidden * 8 / 3 / 64),
        num_hidden_layers=task.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=task.prefix + task.new_tokens,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(task.model_folder)


def preference_of(text: str) -> bytes:
    """The larger one is the better completion: no model, and the same on both sides. ``text``: ids with spaces."""
    return hashlib.sha256(text.encode()).digest()


def text_of(tokens: Any) -> str:
    """Token ids as both sides' tokenizers write them."""
    return " ".join(str(int(token)) for token in tokens)


def given_completions(task: Task, prefix: IntArray) -> IntArray:
    """int64 [K, new_tokens]: stands in for sampling where the sides' losses are compared; a function of the prefix."""
    seed = int.from_bytes(hashlib.sha256(np.ascontiguousarray(prefix, dtype=np.int64).tobytes()).digest()[:8], "big")
    return np.random.default_rng(seed).integers(0, task.vocab_size, (NUM_ROLLOUTS, task.new_tokens))


@dataclass(frozen=True)
class StepReport:
    """What a side says of a step."""

    loss: float
    chosen_log_prob: float
    """Mean over the pairs of the chosen completion's log-prob under the policy before the update."""
    grad_norm: float
    """Before clipping."""
    phases_s: dict[str, float]
    """Wall time: rollout, judge (waited for), reference, train (policy's forward and backward),
    optimizer (clipping too), rest."""
    num_prompts: int
    prefix_tokens: int
    new_tokens: int
    """Tokens of all prefixes, of all completions."""


@dataclass(frozen=True)
class GivenWork:
    """What a side makes of given completions."""

    log_probs: list[list[float]]
    """[K][new_tokens], of the first prompt's completions under the first weights."""
    steps: list[StepReport]
    """The first ``CHECKED_STEPS``."""


def profile_of(step: Callable[[], StepReport], num_rows: int = 25) -> str:
    """Where the CPU time of a side's third step goes, in all of its threads: a table of torch's profiler."""
    for _ in range(2):
        step()
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=everywhere) as profiler:
        found = step()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=num_rows, max_name_column_width=40)
    return f"{found}\n{table}"
