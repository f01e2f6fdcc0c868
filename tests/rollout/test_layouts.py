"""Generation on every layout beside a dense float64 Llama on whole sequences.

Covers TP, sequence parallelism, PP, virtual stages, TP x PP; ragged prefixes, limits and numbers of rollouts. Equal
tokens across layouts hold up to rounding: a uniform within 1e-6 of a boundary would go the other way, and none does.
"""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_sip.distributed import ParallelConfig
from megatron_sip.rollout.random import token_uniforms
from tests.ranks import run_ranks
from tests.rollout import dense
from tests.rollout.claims import EOD, LIMITS, NUM_ROLLOUTS, PREFIX_LENGTHS, SEED_KEY, SHAPE, WARM, Generated, requests
from tests.rollout.test_sampling import reference_distribution

LAYOUTS = {
    "one rank": (1, ParallelConfig(), "auto"),
    "tp 2": (2, ParallelConfig(tensor_model_parallel_size=2), "sharded"),
    "tp 2, sequence parallel": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), "sharded"),
    "pp 2": (2, ParallelConfig(pipeline_model_parallel_size=2), "auto"),
    "pp 2, virtual stages": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
        "auto",
    ),
    "tp 2, pp 2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), "sharded"),
    "tp 2, gathered": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), "gathered"),
    "tp 2, pp 2, gathered": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), "auto"),
}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(1, "tests.rollout.claims:generate_all", (ParallelConfig(), "auto"))[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, one_rank: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank of a layout generated."""
    world_size, *layout = LAYOUTS[request.param]
    if world_size == 1:
        return [one_rank]
    return run_ranks(world_size, "tests.rollout.claims:generate_all", tuple(layout))


@pytest.fixture(scope="module")
def weights(one_rank: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in one_rank["weights"].items()}


def next_logits(weights: dict[str, torch.Tensor], index: int, rollout: Generated) -> torch.Tensor:
    """Logits [n, vocab] that each token of a rollout was chosen from, by a full forward."""
    prefix = requests()[index].prefix.tolist()
    return dense.logits(SHAPE, weights, prefix + rollout.tokens[:-1])[len(prefix) - 1 :]


def every(groups: list[list[Generated]]) -> list[tuple[int, Generated]]:
    assert [len(group) for group in groups] == list(NUM_ROLLOUTS)
    return [(index, rollout) for index, group in enumerate(groups) for rollout in group]


def test_greedy_rollouts_are_the_argmax_of_a_full_forward(
    ranks: list[dict[str, Any]], weights: dict[str, torch.Tensor]
) -> None:
    for index, rollout in every(ranks[0]["greedy"]):
        assert len(rollout.tokens) == LIMITS[index]
        assert rollout.tokens == next_logits(weights, index, rollout).argmax(dim=1).tolist()


@pytest.mark.parametrize("case", ["greedy", "sampled", "eod", "warm"])
def test_log_probs_are_those_of_a_full_forward(
    ranks: list[dict[str, Any]], weights: dict[str, torch.Tensor], case: str
) -> None:
    for index, rollout in every(ranks[0][case]):
        expected = next_logits(weights, index, rollout).log_softmax(dim=1)
        chosen = expected[torch.arange(len(rollout.tokens)), rollout.tokens]
        np.testing.assert_allclose(rollout.log_probs, chosen.numpy(), atol=1e-5)


def test_sampled_rollouts_follow_their_uniforms_through_the_full_forward(
    ranks: list[dict[str, Any]], weights: dict[str, torch.Tensor]
) -> None:
    for index, rollout in every(ranks[0]["sampled"]):
        distribution = next_logits(weights, index, rollout).softmax(dim=1).cumsum(dim=1).numpy()
        numbers = token_uniforms(SEED_KEY.seed, SEED_KEY.step, 100 + index, rollout.rollout, len(rollout.tokens))[0]
        assert rollout.tokens == [int(np.searchsorted(row, u)) for row, u in zip(distribution, numbers, strict=True)]


def test_truncated_and_warm_rollouts_follow_the_reference_distribution(
    ranks: list[dict[str, Any]], weights: dict[str, torch.Tensor]
) -> None:
    for index, rollout in every(ranks[0]["warm"]):
        numbers = token_uniforms(SEED_KEY.seed, SEED_KEY.step, 100 + index, rollout.rollout, len(rollout.tokens))[0]
        for row, number, token in zip(next_logits(weights, index, rollout), numbers, rollout.tokens, strict=True):
            shares = reference_distribution(row.numpy(), WARM)
            assert shares[token] > 0
            assert np.searchsorted(shares.cumsum(), number) == token


def test_layers_unknown_to_the_lean_path_are_decoded_by_their_modules(ranks: list[dict[str, Any]]) -> None:
    for (_, lean), (_, plain) in zip(every(ranks[0]["sampled"]), every(ranks[0]["by modules"]), strict=True):
        assert lean.tokens == plain.tokens
        np.testing.assert_allclose(lean.log_probs, plain.log_probs, atol=1e-5)


def test_query_norms_biases_and_a_tied_output_are_decoded_as_the_model_scores_them(one_rank: dict[str, Any]) -> None:
    assert len(one_rank["other architecture"]) == sum(NUM_ROLLOUTS)
    for sampled, scored in one_rank["other architecture"]:
        np.testing.assert_allclose(sampled, scored, atol=1e-5)


def test_rollouts_of_a_prefix_and_of_two_steps_differ(ranks: list[dict[str, Any]]) -> None:
    assert len({tuple(rollout.tokens) for rollout in ranks[0]["sampled"][0]}) == NUM_ROLLOUTS[0]
    for (_, now), (_, later) in zip(every(ranks[0]["sampled"]), every(ranks[0]["next step"]), strict=True):
        assert now.tokens != later.tokens


def test_a_rollout_does_not_depend_on_its_batch(ranks: list[dict[str, Any]]) -> None:
    for (_, large), (_, small) in zip(every(ranks[0]["sampled"]), every(ranks[0]["small batches"]), strict=True):
        assert large.tokens == small.tokens
        np.testing.assert_allclose(large.log_probs, small.log_probs, atol=1e-5)


def test_rows_that_join_a_running_batch_generate_what_they_would_have_alone(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["blocks decoded together"] >= 2, "nothing has joined a running batch"
    lengths = set()
    for alone, refilled in zip(ranks[0]["many"], ranks[0]["refilled"], strict=True):
        for first, second in zip(alone, refilled, strict=True):
            assert first.tokens == second.tokens
            np.testing.assert_allclose(first.log_probs, second.log_probs, atol=1e-5)
            lengths.add(len(first.tokens))
    assert len(lengths) >= 5, "the rollouts must end at different times"


def test_a_captured_decode_step_repeats_what_an_eager_one_does(one_rank: dict[str, Any]) -> None:
    captures, replays = one_rank["captures and replays"]
    assert captures >= 3 and replays >= 30, "widths and batches change"
    for captured, eager in (("captured", "sampled"), ("captured, longer", "longer")):
        assert one_rank[captured] == one_rank[eager]


def test_a_rollout_ends_with_its_first_eod_and_goes_on_without_one(ranks: list[dict[str, Any]]) -> None:
    ended = 0
    for (index, free), (_, stopped) in zip(every(ranks[0]["sampled"]), every(ranks[0]["eod"]), strict=True):
        length = free.tokens.index(EOD) + 1 if EOD in free.tokens else LIMITS[index]
        ended += length < LIMITS[index]
        assert stopped.tokens == free.tokens[:length]
        assert len(stopped.log_probs) == length
    assert ended >= 3, "the case must hold rollouts that end early"


def test_all_ranks_return_the_same_candidates(ranks: list[dict[str, Any]]) -> None:
    for other in ranks[1:]:
        for case in ("greedy", "sampled", "eod", "warm"):
            assert other[case] == ranks[0][case]


def test_layouts_sample_the_same_tokens_from_the_same_seeds(
    ranks: list[dict[str, Any]], one_rank: dict[str, Any]
) -> None:
    for case in ("greedy", "sampled", "eod", "warm"):
        for (_, here), (_, there) in zip(every(ranks[0][case]), every(one_rank[case]), strict=True):
            assert here.tokens == there.tokens
    assert ranks[0]["sampler"] == one_rank["sampler"]


def test_split_logits_never_give_padding(ranks: list[dict[str, Any]]) -> None:
    drawn = ranks[0]["sampler"]
    assert max(map(max, drawn[: len(drawn) // 2])) < 1000
    assert max(map(max, drawn[len(drawn) // 2 :])) < 60


def test_candidates_carry_rollout_number_and_weight_version(ranks: list[dict[str, Any]]) -> None:
    for group in ranks[0]["sampled"]:
        assert [rollout.rollout for rollout in group] == list(range(len(group)))
        assert {rollout.weight_version for rollout in group} == {42}


def test_generation_leaves_the_model_in_training_mode(ranks: list[dict[str, Any]]) -> None:
    assert all(all(rank["training"]) for rank in ranks)


def test_a_request_for_no_rollouts_gets_none(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["nothing"] == [[]]


def test_syncing_completes_a_parameter_gather_that_was_left_to_the_forward_pass() -> None:
    for updated, expected in run_ranks(2, "tests.rollout.claims:generate_after_a_split_update"):
        assert updated == expected


def test_the_prefixes_are_ragged_enough_to_show_padding_errors() -> None:
    assert len(set(PREFIX_LENGTHS)) >= 4 and 1 in PREFIX_LENGTHS
