"""Covers the sampler on one rank: distribution, support, log-probs, padding. Several ranks: test_layouts.py."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_sip.errors import ConfigurationError
from megatron_sip.rollout import SamplingParameters, VocabParallelSampler

VOCAB, PADDED = 150, 256


def reference_distribution(logits: NDArray[np.float64], parameters: SamplingParameters) -> NDArray[np.float64]:
    """By a plain sort: temperature, then the k largest, then the smallest set that holds p."""
    scaled = logits / parameters.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    keep = np.zeros(len(logits), dtype=bool)
    kept_by_k = order[: parameters.top_k] if parameters.top_k else order
    mass_before = 0.0
    for token in kept_by_k:
        if mass_before >= parameters.top_p * weights[kept_by_k].sum():
            break
        keep[token] = True
        mass_before += weights[token]
    return np.where(keep, weights, 0.0) / weights[keep].sum()


def draw(
    logits: torch.Tensor, uniforms: NDArray[np.float64], parameters: SamplingParameters
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    sampler = VocabParallelSampler(VOCAB, None, 0, 1)
    tokens, log_probs = sampler.sample(
        logits.expand(len(uniforms), -1), torch.from_numpy(np.asarray(uniforms)), parameters
    )
    return tokens.numpy(), log_probs.numpy()


def some_logits(spread: float = 2.0) -> torch.Tensor:
    logits = torch.randn(PADDED, generator=torch.Generator().manual_seed(3)) * spread
    logits[VOCAB:] = 50.0  # padding that would win every draw
    return logits


PARAMETERS = [
    SamplingParameters(),
    SamplingParameters(temperature=0.7),
    SamplingParameters(temperature=1.5, top_k=10),
    SamplingParameters(top_p=0.6),
    SamplingParameters(temperature=1.3, top_p=0.9, top_k=30),
    SamplingParameters(temperature=3.0, top_p=0.99),  # a nucleus wider than what is looked at first
]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_draws_follow_the_reference_distribution(parameters: SamplingParameters) -> None:
    expected = reference_distribution(some_logits()[:VOCAB].double().numpy(), parameters)
    num_draws = 20_000
    tokens, _ = draw(some_logits(), np.random.default_rng(5).random(num_draws), parameters)
    counts = np.bincount(tokens, minlength=PADDED)
    assert counts[VOCAB:].sum() == 0
    assert counts[:VOCAB][expected == 0].sum() == 0
    common = expected * num_draws >= 5
    observed = np.append(counts[:VOCAB][common], counts[:VOCAB][~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * num_draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_an_even_grid_of_uniforms_gives_each_token_its_share(parameters: SamplingParameters) -> None:
    expected = reference_distribution(some_logits()[:VOCAB].double().numpy(), parameters)
    num_draws = 10_000
    tokens, _ = draw(some_logits(), (np.arange(num_draws) + 0.5) / num_draws, parameters)
    assert (np.diff(tokens) >= 0).all(), "the inverse of a distribution function does not fall"
    counts = np.bincount(tokens, minlength=VOCAB)
    assert np.abs(counts - expected * num_draws).max() <= 1.5


@pytest.mark.parametrize("parameters", [*PARAMETERS, SamplingParameters(temperature=0.0)])
def test_log_probs_are_of_the_untruncated_softmax_at_temperature_one(parameters: SamplingParameters) -> None:
    tokens, log_probs = draw(some_logits(), np.random.default_rng(6).random(200), parameters)
    expected = torch.log_softmax(some_logits()[:VOCAB].double(), dim=0)[torch.from_numpy(tokens)]
    np.testing.assert_allclose(log_probs, expected.numpy(), atol=2e-6)


def test_the_ends_of_the_unit_interval_give_tokens_of_positive_probability() -> None:
    logits = torch.full((PADDED,), -torch.inf)
    logits[[40, 100]] = torch.tensor([0.0, 1.0])
    tokens, _ = draw(logits, np.array([0.0, np.nextafter(1.0, 0.0)]), SamplingParameters())
    assert tokens.tolist() == [40, 100]


def test_greedy_takes_the_first_of_equal_maxima_and_no_padding() -> None:
    logits = torch.zeros(PADDED)
    logits[[70, 90]] = 5.0
    logits[VOCAB:] = 9.0
    tokens, _ = draw(logits, np.array([0.9]), SamplingParameters(temperature=0.0))
    assert tokens.tolist() == [70]


def test_ties_at_the_edge_of_top_k_all_stay_in() -> None:
    logits = torch.zeros(PADDED)
    logits[:4] = torch.tensor([3.0, 2.0, 2.0, 1.0])
    tokens, _ = draw(logits, (np.arange(100) + 0.5) / 100, SamplingParameters(top_k=2))
    assert set(tokens.tolist()) == {0, 1, 2}


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = some_logits().bfloat16()
    tokens, log_probs = draw(logits, np.random.default_rng(8).random(100), SamplingParameters())
    expected = torch.log_softmax(logits[:VOCAB].double(), dim=0)[torch.from_numpy(tokens)]
    np.testing.assert_allclose(log_probs, expected.numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("parameters", "flag"),
    [
        (SamplingParameters(temperature=-1.0), "--rollout-temperature"),
        (SamplingParameters(top_p=0.0), "--rollout-top-p"),
        (SamplingParameters(top_p=1.1), "--rollout-top-p"),
        (SamplingParameters(top_k=-1), "--rollout-top-k"),
    ],
)
def test_impossible_parameters_are_refused_by_flag(parameters: SamplingParameters, flag: str) -> None:
    with pytest.raises(ConfigurationError, match=flag):
        parameters.validate()
