"""Seconds from work, the judge's time, and the fit, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.train.dry_run import JudgeCalls
from megatron_sip.train.plan import judging
from megatron_sip.train.plan.costs import Work
from megatron_sip.train.plan.fit import Sample, fit_pace, predicted
from megatron_sip.train.plan.hardware import (
    DeviceConfig,
    JudgeServer,
    QuestionConfig,
    ServedModelConfig,
    ServingConfig,
    load_hardware,
    load_judge_server,
)
from megatron_sip.train.plan.judging import JudgeTime, exposed_wait
from megatron_sip.train.plan.speed import COMPUTE, LAUNCHES, LINK, MEMORY, Link, Pace, seconds_by_cause

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "hardware"
DEVICE = DeviceConfig(peak_tflops=100.0, memory_bandwidth_gb_s=1000.0, memory_gib=10.0)
PACE = Pace(matmul=0.5, attention=0.25, memory=0.5, launch_us=10.0)
# 10 GB of weights in 16 bit, 1 MB of cache per token; one GPU of 100 TFLOP/s and 1,000 GB/s, half of each reached.
SERVER = JudgeServer(
    ServedModelConfig(5e9, 5e9, 2.0, 1e6),
    ServingConfig(100.0, 1000.0, 0.5, 0.5, gpus_per_server=1, sequences_per_server=10),
    QuestionConfig(template_tokens=100, answer_tokens=200, prefix_cache_hits=0.5),
)


def test_products_take_the_longer_of_operations_and_bytes() -> None:
    heavy = seconds_by_cause(Work(matmul_flops=50e12, weight_bytes=100e9), DEVICE, PACE)
    assert heavy == {COMPUTE: 1.0, MEMORY: 0.0, LAUNCHES: 0.0, LINK: 0.0}
    light = seconds_by_cause(Work(matmul_flops=5e12, weight_bytes=100e9), DEVICE, PACE)
    assert light == {COMPUTE: 0.0, MEMORY: 0.2, LAUNCHES: 0.0, LINK: 0.0}


def test_attention_traffic_launches_and_collectives_come_on_top() -> None:
    work = Work(
        matmul_flops=50e12, attention_flops=25e12, moved_bytes=50e9, launches=1e4, sent_bytes=2e9, collectives=1000
    )
    found = seconds_by_cause(work, DEVICE, PACE, Link(bandwidth_gb_s=10.0, latency_us=50.0))
    assert found == {COMPUTE: 2.0, MEMORY: 0.1, LAUNCHES: pytest.approx(0.1), LINK: pytest.approx(0.25)}


def test_a_pace_is_found_again_from_times_that_it_made() -> None:
    works = [
        Work(matmul_flops=a * 1e12, attention_flops=b * 1e11, moved_bytes=c * 1e9, launches=d)
        for a, b, c, d in ((5, 1, 1, 3), (1, 9, 1, 3), (0.1, 0.1, 9, 4), (0.001, 0.001, 0.01, 90), (2, 2, 2, 20))
    ]
    samples = [Sample("", work, sum(seconds_by_cause(work, DEVICE, PACE).values())) for work in works]
    found = fit_pace(samples, DEVICE)
    for sample in samples:
        assert predicted(sample, DEVICE, found) == pytest.approx(sample.seconds, rel=0.02)


def test_a_judges_load_counts_prompts_once_for_all_votes() -> None:
    # 4 groups of 10 pairs in both orders, 3 votes; 2 pointwise questions. Half of the prefix is cached.
    calls = JudgeCalls(groups=4, pairs_per_group=10, pointwise_per_group=2, votes=3, pair_votes=6)
    load = judging.judge_load(calls, prefix_tokens=1000, suffix_tokens=50, server=SERVER)
    assert (load.requests, load.verdicts) == (80 + 8, 4 * (10 * 6 + 2 * 3))
    assert load.prompt_tokens == 80 * (500 + 100 + 100) + 8 * (500 + 50 + 100)
    assert load.answer_tokens == 264 * 200


def test_a_servers_time_is_reading_and_writing() -> None:
    # A step of 10 answers at a context of 900 + 100: 10 GB of weights and 10 GB of cache at 500 GB/s: 40 ms.
    assert judging.token_seconds(SERVER, prompt_length=900, slots=10) == pytest.approx(0.04)
    load = judging.JudgeLoad(requests=100, verdicts=100, prompt_tokens=50_000, answer_tokens=20_000)
    # Reading: 50,000 x 2 x 5e9 / 50e12 = 10 s; writing: 2,000 steps of 40 ms.
    assert judging.server_seconds(load, SERVER, 900) == pytest.approx(90.0)
    assert judging.pool_time(load, SERVER, 10, rounds=1, prompt_length=900) == JudgeTime(
        pytest.approx(9.0), pytest.approx(9.0)
    )
    # Ten rounds one after the other: 10 answers in all rounds per server, one at a time: 10 x 200 x (10 + 1) / 500 s.
    searched = judging.pool_time(load, SERVER, 10, rounds=10, prompt_length=900)
    assert searched == JudgeTime(pytest.approx(9.0), pytest.approx(44.0))
    assert judging.gpus_to_keep_up(load, SERVER, 900, compute_s=20.0) == 5
    assert judging.lookahead_to_hide(searched, compute_s=20.0, hidden_s=4.0) == 2


def test_few_tokens_meet_few_experts() -> None:
    mixture = ServedModelConfig(10e9, 4e9, 1.0, 0.001, expert_share=0.25)
    server = JudgeServer(mixture, SERVER.serving, SERVER.question)
    # 8 GB are experts: (10 - 4) / (1 - 1/4). One token meets a quarter of them, two 7/16.
    assert judging.token_seconds(server, 0, slots=1) == pytest.approx(4e9 / 500e9, rel=1e-6)
    assert judging.token_seconds(server, 0, slots=2) == pytest.approx(5.5e9 / 500e9, rel=1e-6)


def test_a_wait_is_what_the_step_does_not_hide() -> None:
    judge = JudgeTime(busy_s=6.0, total_s=10.0)
    assert exposed_wait(judge, compute_s=8.0, hidden_s=3.0, lookahead=0) == 7.0
    # One step ahead: 10 <= S + 3, and the pool needs S >= 6: nothing is waited for beyond 8 s of compute.
    assert exposed_wait(judge, compute_s=8.0, hidden_s=3.0, lookahead=1) == 0.0
    assert exposed_wait(judge, compute_s=5.0, hidden_s=3.0, lookahead=1) == 2.0
    # Further ahead the latency is hidden, the pool's pace is not.
    assert exposed_wait(judge, compute_s=5.0, hidden_s=3.0, lookahead=9) == 1.0


def test_fewest_gpus_are_found() -> None:
    load = judging.JudgeLoad(requests=100, verdicts=100, prompt_tokens=50_000, answer_tokens=20_000)
    # 90 GPU seconds; an answer takes 200 x (10 + n) / 500 s of n at a time. Within 12 s (8 + 4): 9 GPUs need 10 s.
    assert judging.gpus_to_hide(load, SERVER, 1, 900, compute_s=10.0, hidden_s=2.0, lookahead=1) == 9
    assert judging.gpus_to_hide(load, SERVER, 1, 900, compute_s=0.1, hidden_s=0.0, lookahead=1) is None


def test_the_hardware_files_are_read() -> None:
    assert load_hardware(EXAMPLES / "h100.yaml").device.peak_tflops == 989
    for path in sorted(EXAMPLES.glob("*.yaml")):
        assert load_hardware(path).name
    for path in sorted((EXAMPLES / "judges").glob("*.yaml")):
        assert load_judge_server(path).name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("train_matmul: 0.7", "train_matmul: 1.7"), "train_matmul is 1.7: give a share of the peak"),
        (("  peak_tflops: 989", "  peak_tflop: 989"), "did you mean peak_tflops?"),
        (("  memory_gib: 80", "  memory_gib: 0"), "memory_gib is 0: give a number above 0"),
        (('optimizer_memory: "assumed', 'optimizer_memory: "guessed'), "say 'measured: how' or 'assumed: from what'"),
    ],
)
def test_a_bad_hardware_file_says_what_to_do(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (EXAMPLES / "h100.yaml").read_text(encoding="utf-8")
    assert change[0] in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(change[0], change[1]), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message.replace("?", r"\?")):
        load_hardware(path)
