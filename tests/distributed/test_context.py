"""Process groups, the collectives on host objects, the CPU platform, and the launcher of ranks itself."""

from __future__ import annotations

import time

import psutil
import pytest

from megatron_sip.distributed import ParallelConfig, memory_metrics, select_device
from megatron_sip.errors import ConfigurationError
from tests.ranks import RankFailure, run_ranks

CLAIMS = "tests.distributed.claims"


def test_four_ranks_of_tensor_two_and_pipeline_two_form_one_replica() -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    reports = run_ranks(4, f"{CLAIMS}:describe_and_talk", sizes)
    assert [report["coordinates"] for report in reports] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [report["leader"] for report in reports] == [True, False, False, False]
    assert [report["first"] for report in reports] == [True, True, False, False]
    assert [report["last"] for report in reports] == [False, False, True, True]
    assert reports[3]["group_ranks"] == [[2, 3], [1, 3], [3], [0, 1, 2, 3]]
    for report in reports:
        assert report["from_leader"] == {"rank": 0}
        assert report["from_last_stage"] == {"rank": 2}
        assert report["sum"] == {"one": 1.0, "tiny": 1e-17, "rank": float(report["rank"])}
        assert report["any_last"] and not report["any_none"]
        assert not report["open_after_shutdown"]


def test_four_ranks_of_tensor_two_form_two_replicas_with_a_leader_each() -> None:
    reports = run_ranks(4, f"{CLAIMS}:describe_and_talk", {"tensor_model_parallel_size": 2})
    assert [report["coordinates"] for report in reports] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [report["leader"] for report in reports] == [True, False, True, False]
    assert [report["from_leader"]["rank"] for report in reports] == [0, 0, 2, 2]
    assert [report["from_zero"]["rank"] for report in reports] == [0, 0, 0, 0]
    assert [report["gathered"] for report in reports] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [report["sum"]["rank"] for report in reports] == [2.0, 4.0, 2.0, 4.0]
    assert {report["sum"]["tiny"] for report in reports} == {2e-17}


def test_one_process_without_torchrun_is_the_whole_job() -> None:
    from tests.distributed.single import in_a_process_without_torchrun

    report = in_a_process_without_torchrun("tests.distributed.claims:describe_and_talk", {})
    assert report["coordinates"] == (0, 0, 0) and report["sizes"] == (1, 1, 1)
    assert report["leader"] and report["first"] and report["last"]
    assert report["gathered"] == [0] and report["any_last"] and not report["any_none"]


def test_cpu_platform_gives_megatron_what_it_asks_of_cuda() -> None:
    reports = run_ranks(2, f"{CLAIMS}:optimizer_names_and_generators")
    for report in reports:
        assert report["device"] == "cpu" and report["tensor_device"] == "cpu" and not report["available"]
        assert report["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
        assert report["cast"] and report["outer_stream_kept"] and report["pinned"] == [1.0]
    assert reports[0]["forked"] != reports[1]["forked"], "tensor-parallel ranks draw different weights"


def test_a_failing_rank_is_reported_with_its_traceback_and_the_waiting_rank_is_ended() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2") as failure:
        run_ranks(2, f"{CLAIMS}:fail_on_rank_one", timeout_s=60)
    assert "ZeroDivisionError: on purpose" in str(failure.value)


def test_nothing_that_a_rank_has_started_outlives_the_launch() -> None:
    [left] = run_ranks(1, f"{CLAIMS}:leave_a_process")
    deadline = time.monotonic() + 5
    while is_running(left) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(left)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context_parallel_size": 2}, "context parallelism is not supported"),
        ({"expert_model_parallel_size": 2}, "expert parallelism is not supported"),
        ({"sequence_parallel": True}, "--tensor-model-parallel-size"),
        ({"num_layers_per_virtual_pipeline_stage": 1}, "--pipeline-model-parallel-size"),
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size is 0"),
        ({"overlap_param_gather": True}, "--overlap-grad-reduce"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_its_remedy(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ParallelConfig(**fields).validate()


def test_world_and_layers_must_divide_into_the_layout() -> None:
    config = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2
    )
    assert config.data_parallel_size(8) == 2
    assert config.num_virtual_stages(8) == 2
    with pytest.raises(ConfigurationError, match="6 ranks do not divide"):
        config.data_parallel_size(6)
    with pytest.raises(ConfigurationError, match="--num-layers 7"):
        config.num_virtual_stages(7)
    with pytest.raises(ConfigurationError, match="does not divide the 3 layers"):
        config.num_virtual_stages(6)


def test_memory_of_the_cpu_is_the_largest_resident_size_in_bytes() -> None:
    metrics = memory_metrics(select_device(0))
    # Python with torch takes more than 50 MB and less than 64 GB: a wrong unit would leave that range.
    assert 50e6 < metrics["mem-max-allocated-bytes"] < 64e9
