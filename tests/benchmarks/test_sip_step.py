"""Our side of benchmarks/sip_step.py at a tiny size, beside transformers' own log-probs. TRL's side needs TRL."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pairs import Side
from benchmarks.sip_step_ours import prepare
from benchmarks.sip_step_task import Task, given_completions

pytest.importorskip("transformers")

PROMPTS, PREFIX, NEW = 2, 24, 6


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("sip_step")
    tiny = Task(str(folder), 64, 2, 101, PREFIX, NEW, PROMPTS, num_steps=8, judge_s=0.05)
    prepare(tiny)
    return tiny


@pytest.fixture(scope="module")
def log_probs(task: Task) -> Iterator[torch.Tensor]:
    """float32 [prompts, 2, NEW]: transformers' log-probs of the first step's given completions."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(task.model_folder)
    rows = []
    for prefix in task.all_prompts()[:PROMPTS]:
        completions = torch.from_numpy(given_completions(task, prefix))
        tokens = torch.cat((torch.from_numpy(prefix).expand(2, -1), completions), dim=1)
        with torch.no_grad():
            logits = model(tokens).logits[:, PREFIX - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0])
    yield torch.stack(rows)


def steps(target: str, task: Task, calls: int, **payload: Any) -> list[Any]:
    side = Side(f"benchmarks.sip_step_ours:{target}", {"task": task, **payload}, "wall")
    found = [side.step()[1] for _ in range(calls)]
    side.close()
    return found


def test_our_side_does_online_dpo_on_given_completions_as_transformers_would(
    task: Task, log_probs: torch.Tensor
) -> None:
    (work,) = steps("given_work", task, 1)
    torch.testing.assert_close(torch.tensor(work.log_probs), log_probs[0], rtol=0, atol=1e-5)
    chosen = 0.0
    for number, prefix in enumerate(task.all_prompts()[:PROMPTS]):
        texts = [" ".join(map(str, row)) for row in given_completions(task, prefix)]
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        chosen += float(log_probs[number, digests.index(max(digests))].sum()) / PROMPTS
    first = work.steps[0]
    assert first.loss == pytest.approx(math.log(2), abs=1e-9)
    assert first.chosen_log_prob == pytest.approx(chosen, abs=1e-4)
    assert (first.num_prompts, first.prefix_tokens, first.new_tokens) == (2, 48, 24)
    assert work.steps[1].loss != first.loss, "the weights were updated"


@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_step_samples_whole_completions_and_times_its_parts(task: Task, lookahead: int) -> None:
    found = steps("training_step", task, 3, lookahead=lookahead)
    assert {(one.num_prompts, one.prefix_tokens, one.new_tokens) for one in found} == {(2, 48, 24)}
    for one in found:
        assert min(one.phases_s[phase] for phase in ("rollout", "reference", "train", "optimizer")) > 0
    if not lookahead:
        # The judge takes 0.05 s from a batch's submission on, the reference works meanwhile.
        assert min(sum(one.phases_s[part] for part in ("judge", "reference", "rest")) for one in found) >= 0.05


def test_a_side_that_fails_ends_the_benchmark_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"benchmarks.nowhere:step ended.*exit 1"):
        Side("benchmarks.nowhere:step", {}, "wall")
