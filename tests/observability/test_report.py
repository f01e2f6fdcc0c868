"""The report: one file, complete, harmless whatever a policy writes, and robust to what is missing."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_sip.errors import DataError
from megatron_sip.observability.metrics import MetricsLog
from megatron_sip.observability.report import write_report
from megatron_sip.observability.report.charts import _usual, _with_margins
from megatron_sip.observability.report.series import RunRecord, Series, mean_of_tenth, running_median, smooth, thin
from megatron_sip.observability.report.svg import Chart, Line, format_number, nice_ticks, render, stack, value_range
from megatron_sip.observability.run_info import write_run_info
from megatron_sip.rollout import CandidatePool

HOSTILE = '</table><script>alert("x")</script><img src=http://example.org/x onerror=alert(1)>&amp;'


class Page(HTMLParser):
    """Tags of a page, whether they close, and the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.open, self.starts, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.starts.append((tag, dict(attributes)))
        if tag not in {"meta", "input", "br", "line", "rect", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.starts.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text += data


def write_run(folder, steps=40, phase="warm-up", metrics=None):
    log = MetricsLog(str(folder))
    for step in range(1, steps + 1):
        scalars = {"lm loss": 5.0 - step / 20, "sip/chosen_rate/rollout": 0.2 if step <= 20 else 0.6}
        labels = {"phase": phase if step <= 20 else "rollouts"}
        log.log(step, {**scalars, **(metrics or {})}, 16 * step, labels)
    log.close()


def sample(step=1, text=HOSTILE, **more):
    candidates = [
        {"kind": "suffix", "rollout": 0, "text": text, "score": 0.25, "criteria": {"quality": 0.25}, "chosen": True},
        {"kind": "rollout", "rollout": 3, "text": "short", "score": None, "criteria": {}, "rejected": True},
    ]
    return {"step": step, "sample_id": 7, "document": 2, "prefix": text, "candidates": candidates, **more}


def report_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_report_is_one_file_with_curves_phases_tiles_and_candidates(tmp_path):
    write_run(tmp_path)
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample(text="a text", reason="tie")) + "\n")
    write_run_info(str(tmp_path), {"model": {"hidden_size": 160}}, {"parameters": "1,742,080"})
    page = report_of(tmp_path)
    assert page.open == []
    for text in (
        "Which candidate is chosen",
        "sip/chosen_rate/rollout",
        "warm-up: steps 1 to 20",
        "rollouts: steps 21 to 40",
        "last tenth; 20.0% in the first",
        "640 samples",
        "1,742,080",
        "teaches nothing: tie",
        "rollout 3",
        "✓ chosen",
        "✗ rejected",
        "missing",
        '"hidden_size": 160',
    ):
        assert text in page.text
    assert not [tag for tag, attributes in page.starts if "src" in attributes or tag == "link"]


def test_chosen_rates_stand_beside_what_a_blind_choice_would_give(tmp_path):
    write_run(tmp_path, metrics={"sip/chosen_rate/suffix": 0.3})
    # 8 rollouts among 10 candidates.
    write_run_info(str(tmp_path), {}, {}, CandidatePool.parse("suffix,rewrite,rollout:8").chance)
    page = report_of(tmp_path)
    assert page.text.count("rollout by chance 80%") == page.text.count("suffix and rewrite by chance 10%") == 1
    assert "20.0% in the first; by chance 80%" in page.text
    # The line stands where the axis says 80 %: the frame is 300 high, from 22 to 274, and shows 0 to 1.
    lines = [float(a["y1"]) for tag, a in page.starts if tag == "line" and a.get("class") == "limit"]
    assert lines == pytest.approx([22 + 0.9 * 252, 22 + 0.2 * 252], abs=0.1)


def test_a_teachers_training_shows_its_rewards_first_and_limits_of_what_is_shown_alone(tmp_path):
    limits = {"alarm_min_distinct_2": 0.33, "alarm_max_repetition": 0.15, "alarm_max_shared_trigrams": 0.5}
    write_run(tmp_path, metrics={"rollout/repetition": 0.02, "validation/reward/safe": 0.9, "loss/grpo": 1e-8})
    write_run_info(str(tmp_path), {"observability": limits}, {})
    text = report_of(tmp_path).text
    assert "repetition at most 15" in text and "distinct-2 at least" not in text and "shared at most" not in text
    assert text.index("Rewards on held-out examples") < text.index("Losses of the objectives")


def test_a_criterion_that_is_constant_by_construction_has_no_chart(tmp_path):
    pairs = {"sip/reward/quality_mean": 0.5, "sip/reward/quality_std": 0.3182}
    write_run(tmp_path, metrics=pairs)
    page = report_of(tmp_path)
    assert "Judge's criteria" not in page.text and "Other scalars (2)" in page.text
    log = MetricsLog(str(tmp_path), resume_step=40)
    log.log(41, {**pairs, "sip/reward/safety_mean": 0.2})
    log.log(42, {**pairs, "sip/reward/safety_mean": 0.6})
    log.close()
    page = report_of(tmp_path)
    assert "Judge's criteria" in page.text and "Other scalars (2)" in page.text


def test_nothing_that_a_run_writes_becomes_markup(tmp_path):
    write_run(tmp_path, phase=HOSTILE, metrics={HOSTILE + "/x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 41, "lm loss": 1.0, "alarms": [HOSTILE]}) + "\n")
    hostile = sample(reason=HOSTILE)
    hostile["candidates"][0] |= {"kind": HOSTILE, "criteria": {HOSTILE: 1.0}}
    (tmp_path / "samples.jsonl").write_text(json.dumps(hostile) + "\n")
    write_run_info(str(tmp_path), {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE})
    page = report_of(tmp_path)
    assert page.open == []
    assert not [tag for tag, _ in page.starts if tag == "img"]
    assert not [tag for tag, attributes in page.starts if any(name.startswith("on") for name in attributes)]
    scripts = [attributes for tag, attributes in page.starts if tag == "script"]
    assert [attributes for attributes in scripts if attributes.get("type") != "application/json"] == [{}]
    assert page.text.count(HOSTILE) >= 8


def test_hover_data_is_json_and_cannot_end_its_script_element(tmp_path):
    write_run(tmp_path, metrics={"loss/</script><b>": 1.0})
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', write_report(tmp_path).read_text())
    names = {series["name"] for block in blocks for series in json.loads(block)["series"]}
    assert "loss/</script><b>" in names


def test_a_run_of_one_step_without_anything_else_has_a_report(tmp_path):
    MetricsLog(str(tmp_path)).log(1, {"lm loss": 3.0, "grad-norm": float("nan")})
    page = report_of(tmp_path)
    assert page.open == []
    assert "No judged sample was recorded." in page.text
    assert "No alarm was raised." in page.text
    assert "Gradient norm" not in page.text


def test_scalars_without_a_chart_of_their_own_are_shown_too(tmp_path):
    write_run(tmp_path, metrics={"something/new": 2.5})
    page = report_of(tmp_path)
    assert "Other scalars (1)" in page.text
    assert "something/new" in page.text


def test_of_many_samples_an_even_selection_with_the_first_and_the_last_is_shown(tmp_path):
    write_run(tmp_path)
    lines = [json.dumps(sample(step=step, text="t")) for step in range(1, 201)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    page = report_of(tmp_path)
    assert "60 of 200 recorded samples" in page.text
    assert "step 1 · " in page.text and "step 200 · " in page.text


def test_control_characters_of_a_young_policy_are_made_visible(tmp_path):
    write_run(tmp_path)
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample(text="a\x00b\x1b\n\tc")) + "\n")
    assert "a␀b␛\n\tc" in report_of(tmp_path).text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl has no steps: give the --run-dir of a run"):
        write_report(tmp_path)


def line(steps, values):
    return Line("x", np.array(steps, dtype=float), np.array(values, dtype=float), 0)


def test_a_curve_is_drawn_where_its_values_are():
    # Inside the frame: 590 - 52 - 12 = 526 wide from 52, 230 - 22 - 26 = 182 high from 22.
    svg = render(Chart([line([1, 2, 3], [0.0, 1.0, 0.5])], (1, 3), (0.0, 1.0)))
    path = ElementTree.fromstring(svg).find(".//path").attrib["d"]
    assert path == "M52.0 204.0L315.0 22.0L578.0 113.0"


def test_a_series_that_pauses_is_not_joined_over_the_pause():
    svg = render(Chart([line([1, 2, 3, 4, 90, 91], [1.0] * 6)], (1, 100), (0.0, 2.0)))
    path = ElementTree.fromstring(svg).find(".//path").attrib["d"]
    assert path.count("M") == 2


def test_a_single_peak_does_not_flatten_the_curve():
    values = [1.0, 1.5, 1.2, 1.4] * 50
    values[100] = 1000.0
    assert value_range([line(range(200), values)])[1] < 3.0


@pytest.mark.parametrize(("value", "expected"), [(0.0, (0.0, 1.0)), (4.0, (0.0, 6.0)), (-4.0, (-6.0, 0.0))])
def test_a_constant_gets_an_axis_with_zero(value, expected):
    assert value_range([line([1, 2], [value, value])]) == expected


def test_ticks_are_round_numbers_inside_the_range():
    assert nice_ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(3.1, 4.9, 4) == pytest.approx([3.5, 4.0, 4.5])
    assert nice_ticks(2.0, 2.0) == [2.0]


def test_numbers_are_short():
    assert [format_number(value) for value in (0, 0.25, 12345, 2.5e6, 3e-4)] == [
        "0",
        "0.25",
        "12.3k",
        "2.5M",
        "3.0e-04",
    ]
    assert format_number(0.123, percent=True) == "12.3%"


def test_stacked_areas_add_up_and_a_missing_part_counts_zero():
    steps, sums = stack([line([1, 2, 3], [1, 1, 1]), line([2, 3], [5, 6])])
    assert steps.tolist() == [1, 2, 3]
    assert [part.tolist() for part in sums] == [[1, 1, 1], [1, 6, 7]]


def test_smoothing_thinning_and_tenths_by_hand():
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert smooth(values, 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    steps, means = thin(np.array([1.0, 2.0, 3.0, 4.0]), values, 2)
    assert (steps.tolist(), means.tolist()) == ([1.5, 3.5], [1.5, 4.5])
    series = Series("x", np.arange(20.0), np.arange(20.0))
    assert (mean_of_tenth(series, last=False), mean_of_tenth(series, last=True)) == (0.5, 18.5)


def test_a_usual_step_is_medians_and_means_of_what_some_steps_do_by_hand():
    np.testing.assert_array_equal(running_median(np.array([1.0, 1.0, 9.0, 1.0, 2.0]), 3), [1.0, 1.0, 1.0, 2.0, 1.5])
    steps = np.arange(1.0, 41.0)
    slow = np.where(steps == 20, 50.0, 2.0)
    train, evaluation = (
        Series("timing/train_s", steps, slow),
        Series("timing/evaluation_s", steps[9::10], np.full(4, 5.0)),
    )
    usual = {one.name: one.values for one in _usual([train, evaluation])}
    # Windows of 40 / 20 = 2 on either side of a step: 3 steps. The slow step is gone; 5 s are 5 / 3 s of each of 3.
    assert set(usual["timing/train_s"]) == {2.0}
    np.testing.assert_allclose(usual["timing/evaluation_s"][8:12], [5 / 3, 5 / 3, 5 / 3, 0.0])


def test_steps_in_which_the_reference_is_the_policy_have_no_accuracy(tmp_path):
    log = MetricsLog(str(tmp_path))
    for step, (margin, accuracy) in enumerate([(0.0, 0.0), (0.5, 1.0), (-0.1, 0.25)], start=1):
        log.log(step, {"rewards/margins": margin, "rewards/accuracies": accuracy}, step, {"phase": "all"})
    log.close()
    kept = _with_margins(RunRecord.read(tmp_path).series())["rewards/accuracies"]
    assert list(kept.steps) == [2, 3] and list(kept.values) == [1.0, 0.25]
    assert "every margin exactly 0" in report_of(tmp_path).text


def test_a_chart_of_zeros_is_among_the_others_and_numbers_have_separators(tmp_path):
    write_run(tmp_path, metrics={"lookahead/steps_ahead": 0.0, "judge/open_batches": 0.0})
    write_run_info(str(tmp_path), {}, {"parameters": 2150592, "device": "cpu"})
    page = report_of(tmp_path)
    assert "Prepared ahead" not in page.text and "Other scalars (2)" in page.text
    assert "parameters 2,150,592 · device cpu" in page.text
