"""One run whose checkpoints pass through DP 2, a kill, TP 2, PP 2 and a single rank, and everything that goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankFailure, run_ranks

CLAIMS = "tests.checkpoint.claims"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(root: Path) -> list[dict[str, Any]]:
    """Both ranks' reports of DP 2."""
    return run_ranks(2, f"{CLAIMS}:two_data_parallel_ranks", str(root))


@pytest.fixture(scope="module")
def chain(root: Path, two: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rank 0's reports of the layouts that follow DP 2, each from the checkpoint of the one before."""
    story = str(root / "story")
    with pytest.raises(RankFailure, match="died without a traceback"):
        run_ranks(1, f"{CLAIMS}:killed_while_saving", story)
    reports = {"after_kill": {"names": sorted(path.name for path in (root / "story").iterdir())}}
    for name in ("tensor", "pipeline"):
        sizes = {f"{name}_model_parallel_size": 2}
        reports[name] = run_ranks(2, f"{CLAIMS}:go_on", {"root": story, "sizes": sizes})[0]
    ranks = run_ranks(2, f"{CLAIMS}:virtual_stages", str(root))
    reports["virtual"] = {name: weights for rank in ranks for name, weights in rank.items()}
    reports["one"] = run_ranks(1, f"{CLAIMS}:one_rank", str(root))[0]
    return reports


def test_three_steps_and_nine_resumed_equal_twelve_straight_bit_for_bit(two: list[dict[str, Any]]) -> None:
    for report in two:
        assert report["saved"]
        assert report["story"]["step"] == 3 and report["story"]["at_load"]
        assert report["story"]["losses"] == report["straight"] and len(report["straight"]) == 9
        assert report["story"]["weights"]


def test_async_save_holds_the_state_of_the_moment_it_was_asked_for(two: list[dict[str, Any]]) -> None:
    for report in two:
        assert report["at_work"] and report["finished"]
        assert report["async"]["at_load"] and report["async"]["losses"] == report["straight"]
        assert report["async"]["weights"]


def test_common_state_comes_back_on_every_rank(two: list[dict[str, Any]]) -> None:
    for report in two:
        run = report["story"]["run"]
        assert run["consumed"] == {"ntp": 24} and run["rng"] == {"seed": 7} and run["blob"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("file", "rank"), [("shard", 1), ("common", 0)])
def test_full_disk_is_the_same_clear_error_on_all_ranks(two: list[dict[str, Any]], file: str, rank: int) -> None:
    for report in two:
        for way in (file, f"{file}_async"):
            message = report["failures"][way]
            assert message.startswith("the checkpoint could not be saved to ") and f"rank {rank}: " in message
            assert "File too large" in message or "failed writing" in message
            assert "Earlier ones are intact: the last whole one is of step 3;" in message
        assert report["failures"][f"{file}_tolerated"] == (False, 1)


def test_a_full_disk_is_said_with_its_free_bytes_whatever_torch_calls_it(two: list[dict[str, Any]]) -> None:
    for report in two:
        for way in ("full", "full_async"):
            message = report["failures"][way]
            assert "rank 1: " in message and "the disk is full: 1,234 bytes are free there" in message
            assert "unexpected pos" not in message and "the last whole one is of step 3;" in message
        # Where nothing was saved before, nothing is promised; where there is room, the limit is.
        assert "There is no earlier one;" in report["failures"]["first"]
        assert "the disk is full" not in report["failures"]["shard"]


def test_writer_that_dies_or_hangs_is_an_error_on_all_ranks(two: list[dict[str, Any]]) -> None:
    for report in two:
        assert "rank 1: the checkpoint writer died (exit code -9)" in report["failures"]["killed"]
        assert "did not finish within 0.01 minutes" in report["failures"]["timeout"]


def test_failed_saves_leave_the_earlier_checkpoint_and_nothing_else(two: list[dict[str, Any]]) -> None:
    for report in two:
        assert report["failures"]["names"] == ["iter_0000003", "latest_checkpointed_iteration.txt"]
        assert report["failures"]["still"] == 3
        assert report["failures"]["then"] == 4, "the next save succeeds"


def test_keep_last_keeps_two_of_the_checkpoints_that_the_interval_asks_for(two: list[dict[str, Any]]) -> None:
    assert two[0]["kept"] == ["iter_0000020", "iter_0000030", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize(
    ("difference", "parts"),
    [
        ("architecture", ["num_layers is 2 in it and 3 here"]),
        ("tokenizer", ["tokenizer is 'tokenizer-a' in it and 'tokenizer-b' here"]),
        ("vocabulary", ["vocab_size is 61 in it and 100 here"]),
        ("layers", ["decoder.layers.", "[2, 32] in it and [3, 32] here"]),
        ("left", ["is of another model: it has output_layer.weight, which has no place here"]),
        ("step", ["iter_0000002 does not exist: whole checkpoints there: 3"]),
    ],
)
def test_mismatch_is_refused_with_both_values(two: list[dict[str, Any]], difference: str, parts: list[str]) -> None:
    for report in two:
        for part in parts:
            assert part in report["refusals"][difference]


def test_kill_9_while_saving_leaves_the_previous_checkpoint_loadable(chain: dict[str, dict[str, Any]]) -> None:
    before, partial, latest = chain["after_kill"]["names"]
    assert (before, latest) == ("iter_0000003", "latest_checkpointed_iteration.txt")
    assert partial.startswith("iter_0000004.partial-")
    assert chain["tensor"]["step"] == 3
    assert chain["tensor"]["names"] == ["iter_0000003", "iter_0000006", "latest_checkpointed_iteration.txt"]


def test_resume_at_another_layout_goes_on_within_rounding(
    two: list[dict[str, Any]], chain: dict[str, dict[str, Any]]
) -> None:
    straight = two[0]["straight"]  # steps 3 to 11, at DP 2
    assert [chain[name]["step"] for name in ("tensor", "pipeline", "one")] == [3, 6, 9]
    assert chain["tensor"]["losses"] == pytest.approx(straight[0:3], rel=1e-5)
    assert chain["pipeline"]["losses"] == pytest.approx(straight[3:6], rel=1e-5)
    assert chain["one"]["losses"] == pytest.approx(straight[6:9], rel=1e-5)


def test_finetune_takes_weights_alone_and_starts_at_step_0(chain: dict[str, dict[str, Any]]) -> None:
    assert chain["one"]["finetune"] == (0, [], ["model"], True)
    assert chain["one"]["pretrained"] == (0, [], ["model"], True)


def test_optimizer_and_random_counters_can_be_left_behind(chain: dict[str, dict[str, Any]]) -> None:
    assert chain["one"]["no_optim"] == (9, ["blob", "consumed"], ["model"], False)


def test_step_to_load_can_be_chosen(chain: dict[str, dict[str, Any]]) -> None:
    assert chain["one"]["ckpt_step"] == (6, ["blob", "consumed", "rng"], ["model", "optimizer"], False)


def test_run_starts_afresh_without_a_checkpoint_unless_it_must_not(chain: dict[str, dict[str, Any]]) -> None:
    assert chain["one"]["missing"] is None
    assert "nothing holds no checkpoint: correct the path" in chain["one"]["missing_strict"]


def test_vocabulary_with_other_padding_keeps_every_real_row(chain: dict[str, dict[str, Any]]) -> None:
    assert chain["one"]["other_padding"] == ([66, 32], True)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "__0_0.distcp"])
def test_file_with_other_contents_is_one_clear_error(chain: dict[str, dict[str, Any]], name: str) -> None:
    message = chain["one"]["damaged"][name]
    assert "cannot be read" in message and "\n" not in message


def test_checkpoint_of_megatron_lm_is_resumed_bit_for_bit(chain: dict[str, dict[str, Any]]) -> None:
    loaded = chain["one"]["megatron_lm"]
    assert loaded["step"] == 7 and loaded["run"] == {} and loaded["weights"] and loaded["losses"]
    assert "hidden_size is 32 in it and 48 here" in loaded["refused"]


def test_checkpoint_of_virtual_stages_loads_into_one_chunk(chain: dict[str, dict[str, Any]]) -> None:
    written, read = chain["virtual"], chain["one"]["virtual"]
    assert "decoder.layers.3.mlp.linear_fc1.weight" in written
    assert read == written


def test_own_policy_takes_the_weights_of_a_plain_gpt_model(chain: dict[str, dict[str, Any]]) -> None:
    assert chain["one"]["policy"] == chain["virtual"]


def test_inspection_shows_step_model_and_tensors(chain: dict[str, dict[str, Any]]) -> None:
    text = chain["one"]["inspection"]
    assert "iter_0000009" in text and "step 9" in text and "TP 1 x PP 2 x DP 1" in text
    assert "num_layers 2" in text and "tokenizer-a" in text
    assert "embedding.word_embeddings.weight  [64, 32]" in text
    # 64 * 32 twice, and per layer 64 * 32 + 32 * 32 + 96 * 32 + 32 * 48 + 2 * 32, and the final norm
    assert "19,616 numbers in the model" in text


def test_reference_is_loaded_where_there_is_one_and_left_out_where_not(chain: dict[str, dict[str, Any]]) -> None:
    assert chain["one"]["reference"] == {
        "absent": ["model", "optimizer"],
        "present": ["model", "reference"],
        "value": [0.5],
        "finetune": ["model"],
    }
