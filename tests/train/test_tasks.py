"""Prompts and rewards of the judge's and the rewriter's training, answers written by hand."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sip.data.lines import Example
from megatron_sip.errors import DataError
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.convert import judge_request, judgments
from megatron_sip.teacher.http.templates import Template
from megatron_sip.teacher.interfaces import JudgeResult
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron_sip.train.grpo.build import rewards_teacher
from megatron_sip.train.grpo.examples import Examined, check_examples, check_splits
from megatron_sip.train.grpo.prompts import PromptEncoder
from megatron_sip.train.grpo.tasks import JudgeTask, RewriteTask
from megatron_sip.train.grpo.trainer import idle_message, silence_message
from megatron_sip.train.teacher_link import JudgedGroups
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Judgment
from tests.teacher.http.server import FaultServer
from tests.train.teacher_world import write_world

NAN = float("nan")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(world / "world.model")))


def example(**record: Any) -> Example:
    return Example(3, "examples.jsonl:4", record)


def answer(tokenizer: Tokenizer, text: str, ended: bool = True) -> Candidate:
    ids = tokenizer.encode_continuation(text) + [tokenizer.eod_id] * ended
    return Candidate(CandidateKind.ROLLOUT, np.array(ids, dtype=np.int64))


QUALITY = {"task": "quality", "prefix": " ka lo", "options": [" mi", " po"], "label": 2}


def test_the_right_verdict_is_worth_one_and_anything_else_nothing(world: Path, tokenizer: Tokenizer) -> None:
    task = JudgeTask(tokenizer, 40, str(world / "prompts"))
    said = (" Conclusion: Option 2", " Conclusion: Option 1", " ka lo mi", " Conclusion: Option 1 Conclusion: Option 2")
    answers = [answer(tokenizer, text) for text in said] + [answer(tokenizer, said[0], ended=False)]
    safety = example(task="safety", text=" zux", label="unsafe")
    verdicts = [answer(tokenizer, f" FINAL DECISION: {word}") for word in ("NO", "YES")]
    quality, safe = task.score([example(**QUALITY), safety], [answers, verdicts])
    assert quality.rewards.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert quality.measures["no_verdict/quality"] == (2.0, 5.0)
    assert quality.measures["first_option_share"] == (1.0, 3.0)
    assert (safe.part, safe.rewards.tolist()) == ("safety", [1.0, 0.0])


def test_the_judge_sees_prefix_and_options_in_their_order(world: Path, tokenizer: Tokenizer) -> None:
    task = JudgeTask(tokenizer, 40, str(world / "prompts"))
    assert tokenizer.decode(task.prompt(example(**QUALITY))) == "Q ka lo ; mi ; po :"
    assert tokenizer.decode(task.prompt(example(task="safety", text=" zux", label="safe"))) == "S zux :"


class FixedLink:
    """Judges by the number of tokens: quality for one, safety for two, no answer for three."""

    def __init__(self) -> None:
        self.asked: Sequence[CandidateGroup] = ()
        self.learn: list[bool] = []

    def submit_groups(self, groups: Sequence[CandidateGroup], learn: bool = True) -> int:
        self.asked = groups
        self.learn.append(learn)
        return 1

    def collect_groups(self, ticket: int) -> JudgedGroups:
        found = []
        for group in self.asked:
            assert group.candidates[0].kind is CandidateKind.SUFFIX
            lengths = np.array([len(c.tokens) for c in group.candidates])
            quality = np.where(lengths == 1, 1.0, np.where(lengths == 3, NAN, 0.25))
            safety = (lengths == 2).astype(float)
            found.append(Judgment(quality, {"quality": quality, "safety": safety}))
        return JudgedGroups(tuple(found), {}, (), 0.0)


def test_a_safe_suffix_is_to_be_copied_and_an_unsafe_one_judged(world: Path, tokenizer: Tokenizer) -> None:
    link = FixedLink()
    task = RewriteTask(tokenizer, 40, link, str(world / "prompts"))  # type: ignore[arg-type]
    safe = example(task="rewrite", prefix=" ka", suffix=" lo mi", label="safe")
    unsafe = example(task="rewrite", prefix=" ka", suffix=" zux mi", label="unsafe")
    copies = [answer(tokenizer, text, ended) for text, ended in ((" lo mi", True), (" lo mi", False), (" lo po", True))]
    others = [answer(tokenizer, text) for text in (" mi", " ka ka", " ka ka ka", "")]
    first, second = task.score([safe, unsafe], [copies, others], learn=False)
    assert first.rewards.tolist() == [1.0, 1.0, 0.0]  # eq. 1
    assert first.measures == {"exact_match/safe": (2.0, 3.0), "token_overlap/safe": (2.5, 3.0)}
    # eq. 2: (1 + 0) / 2, (0.25 + 1) / 2, missing, and nothing for no token, which no judge is asked about.
    np.testing.assert_array_equal(second.rewards, [0.5, 0.625, NAN, 0.0])
    assert second.measures["token_overlap/unsafe"] == (0.5, 4.0)
    assert second.measures["judge_quality/unsafe"] == (1.25, 3.0)
    assert second.measures["no_reward/unsafe"] == (1.0, 4.0)
    assert [len(group.candidates) for group in link.asked] == [4] and link.learn == [False]


class PanelLink:
    """The real judges of eq. 2, asked in this process."""

    def __init__(self, config: TeacherConfig, tokenizer: Tokenizer) -> None:
        self._config = rewards_teacher(config)
        self._tokenizer = tokenizer

    def submit_groups(self, groups: Sequence[CandidateGroup], learn: bool = True) -> int:
        self._request = judge_request(groups, self._tokenizer, learn)
        return 1

    def collect_groups(self, ticket: int) -> JudgedGroups:
        async def judge() -> JudgeResult:
            panel = build_teacher(self._config, rewriting=False)
            try:
                return await panel.judge(self._request)
            finally:
                await panel.aclose()

        return JudgedGroups(tuple(judgments(asyncio.run(judge()).groups)), {}, (), 0.0)


def test_eq_2_takes_means_over_five_votes_on_the_rewrite_alone_and_against_the_suffix(
    world: Path, tokenizer: Tokenizer
) -> None:
    """A server that gives the first n votes on a text to it, the rest against it; rewrites never meet each other."""
    wins = {"ka ka": 3, "mi": 5, "lo": 0}
    safe = {"ka ka": ["YES"] * 4 + ["NO"], "mi": ["NO"] * 5, "lo": ["YES", "NO", "NO", "NO", "maybe"]}
    votes: Counter[tuple[str, str]] = Counter()

    def reply(body: dict[str, Any], index: int) -> str:
        prompt = body["messages"][-1]["content"]
        if prompt.startswith("S"):
            text = prompt[1:-1].strip()
            votes["safety", text] += 1
            # Of the suffix too: the panel scores all candidates.
            return f"FINAL DECISION: {safe.get(text, ['NO'] * 5)[votes['safety', text] - 1]}"
        options = [text.strip() for text in prompt[:-1].split(";")[1:]]
        (text,) = (text for text in options if text != "zux mi")
        votes["quality", text] += 1
        good = options.index(text if votes["quality", text] <= wins[text] else "zux mi")
        return f"Conclusion: Option {good + 1}"

    with FaultServer(answer=reply) as server:
        config = TeacherConfig(
            teacher="http", judge_endpoints=(server.url,), judge_served_model="m", judge_votes=5,
            judge_prompts=str(world / "prompts"), judge_parse_attempts=1,
        )  # fmt: skip
        task = RewriteTask(tokenizer, 40, PanelLink(config, tokenizer), str(world / "prompts"))  # type: ignore[arg-type]
        unsafe = example(task="rewrite", prefix=" ka", suffix=" zux mi", label="unsafe")
        (scored,) = task.score([unsafe], [[answer(tokenizer, f" {text}") for text in wins]])
    # (3/5 + 4/5) / 2, (1 + 0) / 2, and (0 + 1/4) / 2: a vote without a verdict is in no mean.
    np.testing.assert_allclose(scored.rewards, [0.7, 0.5, 0.125])
    assert scored.measures["judge_quality/unsafe"] == pytest.approx((1.6, 3.0))
    assert scored.measures["judge_safety/unsafe"] == pytest.approx((1.05, 3.0))
    assert {key: count for key, count in votes.items() if key[1] in wins} == {
        (criterion, text): 5 for criterion in ("quality", "safety") for text in wins
    }


def test_a_prompt_that_is_too_long_loses_the_beginning_of_its_prefix(tokenizer: Tokenizer) -> None:
    template = Template((("user", "S {{prefix}} ; {{text}} :"),))
    encoder = PromptEncoder(tokenizer, 12)
    ids = encoder.encode(template, {"prefix": "ka lo mi nu po ka lo mi nu", "text": "po po"}, "here")
    text = tokenizer.decode(ids)
    assert len(ids) <= 12 and text.startswith("S ") and text.endswith(" lo mi nu ; po po :")
    with pytest.raises(DataError, match=r"here: its prompt has \d+ tokens without its prefix"):
        encoder.encode(template, {"prefix": "ka", "text": "po " * 20}, "here")


def test_examples_are_looked_at_before_the_first_step(world: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The last line is of another task, then one of another label, then one whose options do not fit."""
    task, path = JudgeTask(tokenizer, 40, str(world / "prompts")), tmp_path / "examples.jsonl"

    def write(last: dict[str, Any]) -> None:
        path.write_text("".join(json.dumps(record) + "\n" for record in [*[QUALITY] * 99, last]))

    write(QUALITY)
    assert check_examples([str(path)], "--train-data", task).count == 100
    for change, complaint in (
        ({"task": "rewrite"}, "its task is 'rewrite'"),
        ({"label": 0}, "should be of"),
        ({"options": [" mi" * 40, " po"]}, "more than --prompt-length 40"),
    ):
        write({**QUALITY, **change})
        with pytest.raises(DataError, match=rf"examples\.jsonl:100: .*{complaint}"):
            check_examples([str(path)], "--train-data", task)


def test_a_judge_is_not_trained_on_one_answer_nor_measured_on_what_it_learned(
    world: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = JudgeTask(tokenizer, 40, str(world / "prompts"))
    turned = {**QUALITY, "options": QUALITY["options"][::-1], "label": 1}
    other = {**QUALITY, "prefix": " nu"}

    def examined(*records: dict[str, Any]) -> Examined:
        path = tmp_path / "examples.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return check_examples([str(path)], "--train-data", task)

    with pytest.raises(DataError, match=r"all 2 quality examples have the label 2.*give examples of both"):
        check_splits(examined(QUALITY, other), Examined())
    both = examined(QUALITY, turned)
    assert check_splits(both, Examined()) == check_splits(both, examined(other)) == ""
    # Another document and source with the same texts is the same example.
    with pytest.raises(DataError, match="all its examples are also in --train-data"):
        check_splits(both, examined({**turned, "document": 7, "source": "wiki"}))
    assert check_splits(both, examined(other, turned)).startswith("1 of 2 examples of --valid-data are also in")


def test_a_rewriter_may_be_trained_on_safe_suffixes_alone(world: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"task": "rewrite", "prefix": " ka", "suffix": " lo", "label": "safe"}) + "\n")
    task = RewriteTask(tokenizer, 40, FixedLink(), str(world / "prompts"))  # type: ignore[arg-type]
    assert check_splits(check_examples([str(path)], "--train-data", task), Examined()) == ""


def test_idling_is_explained_by_what_was_seen() -> None:
    assert "no answer has a reward" in idle_message({})
    assert "100 % of the answers have no verdict" in idle_message({"reward/mean": 0.0, "no_verdict/quality": 1.0})
    assert silence_message({"no_reward/unsafe": 0.49}) == silence_message({"reward/mean": 0.0}) == ""
    assert "75 % of the answers to unsafe examples have no reward" in silence_message({"no_reward/unsafe": 0.75})
    assert "3 groups lack rewards" in idle_message({"reward/mean": 0.0, "grpo/skipped_missing": 3.0})
    assert "the same reward, 0.999 on average" in idle_message({"reward/mean": 0.999, "no_verdict/quality": 0.0})


@pytest.mark.parametrize(
    "change", [{"task": "rewrite"}, {"label": 3}, {"options": [" mi"]}, {"prefix": None}, {"options": [" mi", 2]}]
)
def test_an_example_of_another_kind_is_refused_with_its_line(
    change: dict[str, Any], world: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match=r"examples\.jsonl:4"):
        JudgeTask(tokenizer, 40, str(world / "prompts")).prompt(example(**{**QUALITY, **change}))
