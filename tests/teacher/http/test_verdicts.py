"""Covers prompts and the reading of answers: every form of a verdict, and everything that is none."""

import math

import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.http.config import FACTUALITY_VARIANTS
from megatron_sip.teacher.http.reply import Choice
from megatron_sip.teacher.http.templates import load_template, prompt_digest
from megatron_sip.teacher.http.verdicts import FORMATS, is_refusal, verdict_of

NAMES = ["quality", "safety", "coherence", "rewriter", *(f"factuality_{variant}" for variant in FACTUALITY_VARIANTS)]


def score(criterion, text):
    return verdict_of(Choice(text), FORMATS[criterion], 0.0).score


@pytest.mark.parametrize(
    "criterion, text, expected",
    [
        ("quality", "Both read well.\n\nConclusion: Option 1", 1.0),
        ("quality", "Conclusion: Option 1 at first sight, but no.\n\n**Conclusion:** **Option 2**.", 0.0),
        ("quality", "conclusion : option 2", 0.0),
        ("safety", "Nothing harmful.\nFINAL DECISION: YES", 1.0),
        ("safety", "I would have said FINAL DECISION: YES.\n**FINAL DECISION: NO**", 0.0),
        ("factuality", '{"reasoning": "fine", "label": "No Hallucination"}', 1.0),
        ("factuality", 'Let me see.\n```json\n{"reasoning": "a\tb\nc", "label": "possible_hallucination"}\n```', 0.5),
        (
            "factuality",
            '{"label": "No Hallucination"} is wrong: {"reasoning": "", "label": "Definite Hallucination"}',
            0.0,
        ),
        ("coherence", "B loops.\nVERDICT: A", 1.0),
        ("coherence", "VERDICT: TIE", 0.5),
        ("coherence", "Verdict: **B**", 0.0),
    ],
)
def test_the_last_verdict_in_the_text_counts(criterion, text, expected):
    assert score(criterion, text) == expected


@pytest.mark.parametrize(
    "criterion, text",
    [
        ("quality", ""),
        ("quality", "Option 1 is better."),
        ("quality", "Conclusion: Option 12"),
        ("quality", "Conclusion: both"),
        ("safety", "FINAL DECISION: PERHAPS"),
        ("safety", "FINAL DECISION: NONE"),
        ("factuality", '{"reasoning": "fine"}'),
        ("factuality", '{"label": "unsure"}'),
        ("factuality", '{"label": ""}'),
        ("coherence", "VERDICT: C"),
        ("coherence", "VERDICT: Both"),
    ],
)
def test_a_text_without_a_verdict_is_missing(criterion, text):
    verdict = verdict_of(Choice(text), FORMATS[criterion], 0.0)
    assert math.isnan(verdict.score) and verdict.failure.startswith("unparsable") and verdict.raw == text


def test_a_refusal_is_told_from_nonsense_and_a_cut_answer_is_missing():
    assert verdict_of(Choice("I'm sorry, but I can't help with that."), FORMATS["quality"], 0.0).failure.startswith(
        "refused"
    )
    cut = verdict_of(Choice("Conclusion: Option 1 seems", cut=True), FORMATS["quality"], 0.0)
    assert math.isnan(cut.score) and cut.failure.startswith("unparsable: cut off")
    # A judge that apologizes and then decides has decided.
    assert score("quality", "I'm sorry to be brief.\nConclusion: Option 2") == 0.0


def test_refusals_are_known_by_how_they_begin():
    for text in (
        "I cannot help with that.",
        "Sorry, no.",
        "I\u2019m unable to continue this text",
        "As an AI language model",
    ):
        assert is_refusal(text), text
    for text in ("The sorry state of the roads", "I cannot see the sea from here", "She said: I'm sorry"):
        assert not is_refusal(text), text


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_is_complete_and_begins_with_what_the_server_can_cache(name):
    values = {"prefix": "PRE {{text}}", "reference": "REF", "text": "TEXT", "suffix": "SUF", "lead_in": "IN",
              "option_1": "ONE", "option_2": "TWO"}  # fmt: skip
    messages = load_template(name).render(values)
    content = messages[0]["content"]
    assert messages[0]["role"] == "user"
    if name == "safety":
        assert "TEXT" in content and "PRE" not in content and "FINAL DECISION: YES" in content
        return
    # Texts are put in once and not searched for names again.
    assert content.startswith("The beginning of a document:\n<prefix>\nPRE {{text}}\n</prefix>")
    needles = {"quality": ["ONE", "TWO", "Conclusion: Option 1"], "coherence": ["ONE", "TWO", "VERDICT: TIE"],
               "rewriter": ["INSUF"], "factuality": ["TEXT", '"label"', "Definite Hallucination"]}  # fmt: skip
    assert all(needle in content for needle in needles[name.partition("_")[0]])
    assert ("REF" in content) == ("reference" in name)
    if name == "rewriter":
        assert messages[-1] == {"role": "assistant", "content": "IN"}


def test_all_prompts_of_a_prefix_share_their_beginning():
    values = {
        "prefix": "P" * 50,
        "reference": "",
        "text": "",
        "suffix": "",
        "lead_in": "",
        "option_1": "",
        "option_2": "",
    }
    starts = {load_template(name).render(values)[0]["content"][:90] for name in NAMES if name != "safety"}
    assert len(starts) == 1


def test_a_users_template_replaces_ours_and_is_checked(tmp_path):
    (tmp_path / "quality.txt").write_text("=== system\nBe fair.\n=== user\n{{option_1}} or {{ option_2 }}?\n")
    template = load_template("quality", str(tmp_path))
    assert template.render({"option_1": "a", "option_2": "b"}) == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "a or b?"},
    ]
    assert load_template("safety", str(tmp_path)) == load_template("safety")
    (tmp_path / "coherence.txt").write_text("{{option_1}}")
    (tmp_path / "safety.txt").write_text("{{text}} after {{prefix}}")
    for name in ("coherence", "safety"):
        with pytest.raises(ConfigurationError, match=f"{name}.txt"):
            load_template(name, str(tmp_path))


def test_prompts_that_differ_in_where_a_text_ends_have_different_hashes():
    one = [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "bc"}]
    assert prompt_digest(one) != prompt_digest(two)
