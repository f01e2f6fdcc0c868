"""A checkpoint as the teacher: weights, prompts, verdicts, votes, the process and its errors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sip.errors import CheckpointError, ConfigurationError
from megatron_sip.teacher import TeacherProcess
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import JudgeGroup, JudgeRequest, Passage, RewriteItem, RewriteRequest
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.tokenizer.training import train_sentencepiece
from tests.ranks import run_ranks
from tests.train.teacher_world import recipe, write_world

FACTORY = "megatron_sip.train.model_teacher:build_model_teacher"
NONE = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the checkpoint of a judge that was trained for a step."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    changes = {"train_iters": 1, "save": str(folder / "judge"), "eval_interval": 0}
    run_ranks(1, "tests.train.teacher_world:train", {"task": "judge", "recipe": recipe(folder, "judge", **changes)})
    return folder


def config(world: Path, **changes: Any) -> TeacherConfig:
    made = TeacherConfig(
        **{
            "teacher": "model",
            "judge_checkpoint": str(world / "judge"),
            "rewriter_checkpoint": str(world / "judge"),
            "judge_prompts": str(world / "prompts"),
            "judge_prompt_length": 40,
            "judge_max_tokens": 6,
            "judge_safety_weight": 1.0,
            **changes,
        }
    )
    made.validate()
    return made


def options(world: Path) -> dict[str, Any]:
    return {"tokenizer": TokenizerConfig(tokenizer_model=str(world / "world.model"))}


def group(number: int) -> JudgeGroup:
    texts = (Passage(NONE, " lo mi"), Passage(NONE, " po po"), Passage(NONE, " ka"))
    return JudgeGroup(number, Passage(NONE, " ka lo"), texts[0], texts, ("suffix", "rollout", "rollout"))


def test_a_checkpoint_judges_and_rewrites_in_the_teachers_process(world: Path) -> None:
    """Its weights are nearly random: no verdict is in its answers, and none is made up."""
    with TeacherProcess(config(world, judge_votes=2), options(world), factory=FACTORY) as process:
        process.submit("judge", JudgeRequest((group(0), group(1))))
        process.submit("rewrite", RewriteRequest((RewriteItem(0, Passage(NONE, " ka"), Passage(NONE, " lo mi")),)))
        judged, rewritten = process.collect("judge", 60.0), process.collect("rewrite", 60.0)
    for verdict in judged.groups:  # type: ignore[union-attr]
        # 3 pairs and 3 texts, 2 votes each.
        assert (verdict.num_calls, verdict.num_comparisons) == (12, 3)
        assert np.isnan(verdict.scores).all() and verdict.num_failures == 12
    assert judged.failures == {"unparsable": 24}  # type: ignore[union-attr]
    (rewrite,) = rewritten.rewrites  # type: ignore[union-attr]
    assert (rewrite.text is None) == bool(rewrite.failure)


def judge_twice(payload: dict[str, Any]) -> dict[str, Any]:
    """Answers of the judge to two votes, alone and among others; of a judge that says what it is made to say."""
    from megatron_sip.teacher.interfaces import Question
    from megatron_sip.train.model_teacher import OwnModels
    from megatron_sip.train.weights import open_model
    from megatron_sip.types import Candidate, CandidateKind

    world = Path(payload["world"])
    models = OwnModels(config(world), options(world)["tokenizer"])
    judge = models.judge("quality")
    first, other = Question(group(0), (0, 1), 1), Question(group(0), (1, 0), 0)
    (alone,) = asyncio.run(judge.ask([first]))

    async def together() -> Any:
        return await asyncio.gather(judge.ask([other, first]), judge.ask([Question(group(0), (0, 1), 0)]))

    (_, among), (vote_zero,) = asyncio.run(together())
    try:
        other_tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=payload["other"]))
        open_model(str(world / "judge"), other_tokenizer, models._context)
        refusal = ""
    except CheckpointError as error:
        refusal = str(error)
    tokenizer, said = judge._generator.tokenizer, " Conclusion: Option 2"
    tokens = np.array([*tokenizer.encode_continuation(said), tokenizer.eod_id])
    spoken = judge._verdict(Candidate(CandidateKind.ROLLOUT, tokens))
    cut = judge._verdict(Candidate(CandidateKind.ROLLOUT, tokens[:-1]))
    return {
        "alone": alone.raw,
        "among": among.raw,
        "vote zero": vote_zero.raw,
        "spoken": (spoken.score, spoken.raw, spoken.failure),
        "cut": (cut.score, cut.failure),
        "refusal of another tokenizer": refusal,
        "shared": models.rewriter()._generator is judge._generator,
        "model": judge.identity().model,
    }


def test_a_verdict_depends_on_the_prompt_and_the_vote_alone(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    train_sentencepiece([world / "text.jsonl"], other, 330, num_threads=1)
    payload = {"world": str(world), "other": str(other)}
    (found,) = run_ranks(1, "tests.train.test_model_teacher:judge_twice", payload)
    assert found["alone"] == found["among"] != found["vote zero"]
    assert found["spoken"] == (0.0, " Conclusion: Option 2", "")
    assert np.isnan(found["cut"][0]) and found["cut"][1].startswith("unparsable")
    assert found["shared"]
    # The world's judge was trained for a step.
    assert found["model"] == str(world / "judge" / "iter_0000001")
    assert "--judge-tokenizer-model" in found["refusal of another tokenizer"]


def test_what_a_model_cannot_judge_or_lacks_is_said(world: Path) -> None:
    with pytest.raises(ConfigurationError, match="judge-factuality-weight"):
        config(world, judge_factuality_weight=1.0)
    lacking = config(world, judge_checkpoint="", rewriter_checkpoint="", rewriter="model")
    assert [line.split(":")[0] for line in lacking.missing_models()] == ["--judge-checkpoint", "--rewriter-checkpoint"]
    assert config(world, rewriter_checkpoint="").rewriter_kind == "rule" and config(world).rewriter_kind == "model"
    with pytest.raises(ConfigurationError, match="need a process with Megatron-Core"):
        build_teacher(config(world))
