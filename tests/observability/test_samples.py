"""Recorded samples: who was compared, what they scored, what was chosen."""

import json

import numpy as np

from megatron_sip.observability.run_info import read_run_info, write_run_info
from megatron_sip.observability.samples import MAX_PREFIX_CHARACTERS, SampleLog
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Judgment, Preference, Sample


def decode(tokens):
    return "".join(chr(token) for token in tokens)


def encode(text):
    return np.array([ord(character) for character in text])


def preference(judged=True):
    group = CandidateGroup(
        Sample(12, 3, encode("Once"), encode(" upon")),
        (
            Candidate(CandidateKind.SUFFIX, encode(" upon")),
            Candidate(CandidateKind.ROLLOUT, encode(" <b>ü"), rollout=1),
        ),
    )
    if not judged:
        return Preference(group, None, None, None, 0.0, "missing")
    scores = np.array([0.5, np.nan])
    return Preference(group, Judgment(scores, {"quality": scores}), 0, 1, 1.0)


def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_judged_sample_is_recorded_as_text_with_scores_and_choice(tmp_path):
    SampleLog(str(tmp_path), decode).log(4, [preference()])
    (record,) = read(tmp_path)
    assert {key: record[key] for key in ("step", "sample_id", "document", "prefix", "weight", "reason")} == {
        "step": 4,
        "sample_id": 12,
        "document": 3,
        "prefix": "Once",
        "weight": 1.0,
        "reason": "",
    }
    assert record["candidates"] == [
        {
            "kind": "suffix",
            "rollout": 0,
            "num_tokens": 5,
            "text": " upon",
            "score": 0.5,
            "criteria": {"quality": 0.5},
            "chosen": True,
            "rejected": False,
        },
        {
            "kind": "rollout",
            "rollout": 1,
            "num_tokens": 5,
            "text": " <b>ü",
            "score": None,
            "criteria": {"quality": None},
            "chosen": False,
            "rejected": True,
        },
    ]


def test_a_sample_without_verdict_is_recorded_with_the_reason(tmp_path):
    SampleLog(str(tmp_path), decode).log(1, [preference(judged=False)])
    (record,) = read(tmp_path)
    assert record["reason"] == "missing"
    assert [c["score"] for c in record["candidates"]] == [None, None]
    assert not any(c["chosen"] or c["rejected"] for c in record["candidates"])


def test_resume_drops_samples_beyond_the_checkpoint(tmp_path):
    first = SampleLog(str(tmp_path), decode)
    first.log(1, [preference(), preference()])
    first.log(2, [preference()])
    first.close()
    SampleLog(str(tmp_path), decode, resume_step=1).log(2, [preference(judged=False)])
    assert [(record["step"], record["reason"]) for record in read(tmp_path)] == [(1, ""), (1, ""), (2, "missing")]


def test_of_a_long_prefix_the_end_is_kept(tmp_path):
    long = Preference(CandidateGroup(Sample(0, 0, encode("a" * 5000 + "end"), encode("")), ()), None, None, None, 0.0)
    SampleLog(str(tmp_path), decode).log(1, [long])
    (record,) = read(tmp_path)
    assert len(record["prefix"]) == MAX_PREFIX_CHARACTERS
    assert record["prefix"].endswith("aend")
    assert record["num_prefix_tokens"] == 5003


def test_run_info_keeps_configuration_and_versions(tmp_path):
    write_run_info(str(tmp_path / "new"), {"model": {"num_layers": 4}}, {"parameters": 10})
    info = read_run_info(tmp_path / "new")
    assert info["config"] == {"model": {"num_layers": 4}}
    assert info["facts"] == {"parameters": 10}
    assert {"python", "torch", "megatron-core"} <= set(info["versions"])
    assert read_run_info(tmp_path) == {}
