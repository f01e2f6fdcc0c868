"""Covers the reading of phases, counts per stream, ramps and the trigger. All numbers are worked out by hand."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.config import from_mapping, to_yaml
from megatron_sip.config.yaml_text import parse_yaml
from megatron_sip.curriculum import Curriculum, CurriculumConfig, TriggerState
from megatron_sip.errors import ConfigurationError

NONE = TriggerState()


def phases(*entries):
    return CurriculumConfig(phases=entries)


def counts(curriculum, step, state=NONE):
    return {stream: n for stream, n in curriculum.plan(step, state).counts.items() if n}


def test_without_a_curriculum_every_sample_of_every_step_is_judged():
    curriculum = Curriculum(CurriculumConfig(), global_batch_size=256, dp_size=64)
    assert counts(curriculum, 0) == counts(curriculum, 20_999) == {"rollout": 256}
    assert curriculum.total_steps is None


def test_compact_and_yaml_form_are_the_same_phases():
    compact = CurriculumConfig(
        curriculum="ntp:400:name=warm-up; ntp=0.5,rewrite=0.5:60:name=rewrites; "
        "ntp=0.5,rollout=0.5*2:200:name=rollouts:ramp=20:win_rate=0.2:probe_every=10:max_steps=100"
    )
    yaml = phases(
        {"name": "warm-up", "steps": 400, "ntp": 1.0},
        {"name": "rewrites", "steps": 60, "ntp": 0.5, "rewrite": 0.5},
        {
            "name": "rollouts",
            "steps": 200,
            "ntp": 0.5,
            "rollout": 0.5,
            "weights": {"rollout": 2.0},
            "ramp": 20,
            "wait_for": {"rollout_win_rate": 0.2, "probe_every": 10, "max_steps": 100},
        },
    )
    assert compact.parsed() == yaml.parsed()
    assert Curriculum(yaml, 16).total_steps == 400 + 60 + 200 + 100
    assert Curriculum(yaml, 16).streams == ("ntp", "rewrite", "rollout")


def test_phases_pass_through_a_recipe_and_back():
    text = "phases: [{name: a, steps: 4, ntp: 1.0}, {name: b, rollout: 1, wait_for: {rollout_win_rate: 0.2}}]"
    config = from_mapping(CurriculumConfig, parse_yaml(text, "recipe"))
    assert [phase.name for phase in config.parsed()] == ["a", "b"]
    assert from_mapping(CurriculumConfig, parse_yaml(to_yaml(config), "recipe")).parsed() == config.parsed()


def test_phases_follow_each_other_and_the_last_goes_on():
    curriculum = Curriculum(CurriculumConfig(curriculum="ntp:3; ntp=0.5,rewrite=0.5:2; rollout:4"), 8)
    expected = [{"ntp": 8}] * 3 + [{"ntp": 4, "rewrite": 4}] * 2 + [{"rollout": 8}] * 6
    assert [counts(curriculum, step) for step in range(11)] == expected


def test_counts_go_by_largest_remainder():
    # 10 samples at .45/.35/.20: 4.5, 3.5, 2.0 -> 4, 3, 2 and one left over, for the first of the equal remainders.
    curriculum = Curriculum(CurriculumConfig(curriculum="ntp=0.45,rewrite=0.35,rollout=0.2"), 10)
    assert counts(curriculum, 0) == {"ntp": 5, "rewrite": 3, "rollout": 2}


def test_counts_fill_whole_micro_batches_on_every_replica():
    # Units: ntp 2 x 4 = 8, rollout 2 x 2 = 4, so blocks of 8; 48 samples are 6 blocks, shares 4.2 and 1.8 of them.
    curriculum = Curriculum(
        CurriculumConfig(curriculum="ntp=0.7,rollout=0.3"), 48, dp_size=2, micro_batch_sizes={"ntp": 4, "rollout": 2}
    )
    assert counts(curriculum, 0) == {"ntp": 32, "rollout": 16}


def test_shares_that_are_exact_stay_exact_in_floating_point():
    # 0.1 + 0.2 > 0.3 in floating point; 0.29 * 100 = 28.999999999999996.
    curriculum = Curriculum(CurriculumConfig(curriculum="ntp=0.29,rollout=0.71"), 100)
    assert counts(curriculum, 0) == {"ntp": 29, "rollout": 71}


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    dp=st.sampled_from([1, 2, 4]),
    sizes=st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4),
)
def test_counts_sum_to_the_batch_and_stay_within_one_block_of_the_share(parts, dp, sizes):
    streams = ("ntp", "suffix", "rewrite", "rollout")
    shares = {s: p / sum(parts) for s, p in zip(streams, parts, strict=True)}
    micro = dict(zip(streams, sizes, strict=True))
    curriculum = Curriculum(phases(shares), 1024, dp, micro)
    found = curriculum.plan(0, NONE).counts
    assert sum(found.values()) == 1024
    for stream in streams:
        assert found[stream] % (dp * micro[stream]) == 0
        assert abs(found[stream] - shares[stream] * 1024) < dp * max(sizes)


def test_a_ramp_moves_the_mixture_in_equal_steps():
    curriculum = Curriculum(CurriculumConfig(curriculum="ntp:2; rollout:10:ramp=3"), 8)
    assert [counts(curriculum, s).get("rollout", 0) for s in range(7)] == [0, 0, 2, 4, 6, 8, 8]


def test_a_trigger_waits_probes_and_opens_on_the_step_after():
    config = phases(
        {"name": "a", "steps": 4, "ntp": 1.0},
        {"name": "b", "rollout": 1.0, "wait_for": {"rollout_win_rate": 0.2, "probe_every": 3}},
    )
    curriculum = Curriculum(config, 4)
    assert [s for s in range(12) if curriculum.plan(s, NONE).probe] == [3, 6, 9]
    assert curriculum.plan(1000, NONE).phase == "a"
    state = curriculum.observe(3, 0.19, NONE)
    assert curriculum.observe(6, math.nan, state) == state == NONE
    assert curriculum.observe(7, 0.9, state) == NONE, "no probe was due at step 7"
    state = curriculum.observe(6, 0.2, state)
    assert [curriculum.plan(s, state).phase for s in (6, 7, 8)] == ["a", "b", "b"]
    assert not curriculum.plan(9, state).probe


def test_a_trigger_gives_up_after_max_steps():
    config = phases(
        {"name": "a", "steps": 4, "ntp": 1.0},
        {"name": "b", "steps": 5, "rollout": 1.0, "wait_for": {"rollout_win_rate": 1.0, "max_steps": 6}},
        {"name": "c", "suffix": 1.0},
    )
    curriculum = Curriculum(config, 4)
    assert [curriculum.plan(s, NONE).phase for s in (9, 10, 14, 15)] == ["a", "b", "b", "c"]
    state = curriculum.observe(3, 1.0, NONE)
    assert [curriculum.plan(s, state).phase for s in (3, 4, 8, 9)] == ["a", "b", "b", "c"]


def test_trigger_state_survives_a_checkpoint():
    state = TriggerState({"b": 7})
    assert TriggerState.from_state_dict(json.loads(json.dumps(state.state_dict()))) == state


def test_weights_default_to_one_and_are_per_phase():
    curriculum = Curriculum(phases({"steps": 1, "ntp": 1.0}, {"rollout": 1.0, "weights": {"rollout": 0.5}}), 4)
    assert curriculum.plan(0, NONE).weights["rollout"] == 1.0
    assert curriculum.plan(1, NONE).weights["rollout"] == 0.5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CurriculumConfig(curriculum="ntp=0.5,rollout=0.4:10"), ["0.9", "sum to 1"]),
        (CurriculumConfig(curriculum="nto:10; rollout"), ["'nto'", "did you mean ntp"]),
        (CurriculumConfig(curriculum="ntp:x; rollout"), ["'x'", "number"]),
        (CurriculumConfig(curriculum="ntp; rollout"), ["no number of steps"]),
        (CurriculumConfig(curriculum="ntp:10:speed=2"), ["'speed'", "ramp"]),
        (CurriculumConfig(curriculum=" ; "), ["no phase"]),
        (CurriculumConfig(curriculum="ntp=0.5,ntp=1:10"), ["'ntp' twice", "one share"]),
        (CurriculumConfig(curriculum="ntp:5:ramp=2"), ["first"]),
        (CurriculumConfig(curriculum="ntp:5; rollout:5:ramp=9"), ["9", "5 steps"]),
        (CurriculumConfig(curriculum="ntp:0"), ["steps", "0"]),
        (CurriculumConfig(curriculum="ntp:1.5"), ["1.5", "whole"]),
        (phases({"name": "x", "steps": 1, "ntp": 1}, {"name": "x", "ntp": 1}), ["'x'", "twice"]),
        (phases({"ntp": 1, "wait_for": {"probe_every": 2}}), ["rollout_win_rate"]),
        (phases({"ntp": True}), ["True"]),
        (CurriculumConfig(curriculum="ntp", phases=({"ntp": 1},)), ["both"]),
    ],
)
def test_a_bad_curriculum_names_value_and_remedy(config, words):
    with pytest.raises(ConfigurationError) as error:
        config.validate()
    for word in words:
        assert word in str(error.value)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigurationError, match="global batch size 12 is not a multiple of 8"):
        Curriculum(CurriculumConfig(), 12, dp_size=4, micro_batch_sizes={"rollout": 2})


def test_a_share_too_small_for_one_block_is_refused():
    with pytest.raises(ConfigurationError, match=r"share 0\.05 of rollout is less than one block of 4"):
        Curriculum(CurriculumConfig(curriculum="ntp=0.95,rollout=0.05"), 16, dp_size=4)
