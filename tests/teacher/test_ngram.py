"""Covers Witten-Bell probabilities against a toy corpus worked out by hand, and the file format."""

import numpy as np
import pytest

from megatron_sip.errors import DataError
from megatron_sip.teacher.ngram import NgramModel, fit_ngrams

# Two documents, vocabulary {0, 1, 2, 3}: "0 1 0 1 2" and "1 0".
TOKENS = np.array([0, 1, 0, 1, 2, 1, 0])
LENGTHS = np.array([5, 2])
# Unigram counts 0: 3, 1: 3, 2: 1, 3: 0; N = 7, T = 3; uniform 1/4.
P1 = {0: (3 + 0.75) / 10, 1: (3 + 0.75) / 10, 2: (1 + 0.75) / 10, 3: 0.75 / 10}
# After 0: 1 twice (c 2, T 1). After 1: 0 twice, 2 once (c 3, T 2). After 2: nothing, its document ends there.
P2_1_AFTER_0 = (2 + 1 * P1[1]) / 3
P2_0_AFTER_1 = (2 + 2 * P1[0]) / 5
P2_2_AFTER_1 = (1 + 2 * P1[2]) / 5
P2_3_AFTER_1 = (0 + 2 * P1[3]) / 5
# After 0 1: 0 once, 2 once (c 2, T 2). After 1 0: 1 once (c 1, T 1).
P3_0_AFTER_01 = (1 + 2 * P2_0_AFTER_1) / 4
P3_1_AFTER_10 = (1 + 1 * P2_1_AFTER_0) / 2


def toy(order=3, **options):
    return fit_ngrams(TOKENS, LENGTHS, vocab_size=4, order=order, **options)


def prob(model, *window):
    padded = [-1] * (model.order - len(window)) + list(window)
    return model.window_probs(np.array([padded]))[-1, 0]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0,), P1[0]),
        ((3,), P1[3]),
        ((0, 1), P2_1_AFTER_0),
        ((1, 2), P2_2_AFTER_1),
        ((1, 3), P2_3_AFTER_1),
        ((2, 1), P1[1]),
        ((0, 1, 0), P3_0_AFTER_01),
        ((1, 0, 1), P3_1_AFTER_10),
        ((3, 1, 0), P2_0_AFTER_1),
        ((1, 2, 0), P1[0]),
    ],
)
def test_probabilities_are_those_worked_out_by_hand(window, expected):
    assert prob(toy(), *window) == pytest.approx(expected, rel=1e-12)


def test_no_ngram_crosses_the_end_of_a_document():
    model = toy()
    assert model.ngram_counts(np.array([[2, 1], [1, 2], [0, 1]])).tolist() == [0, 1, 2]


def test_probabilities_sum_to_one_in_every_context():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 60)
    tokens = np.minimum(rng.geometric(0.2, lengths.sum()), 29)
    model = fit_ngrams(tokens, lengths, vocab_size=30, order=4)
    contexts = [tokens[i : i + 3] for i in range(0, 300, 7)] + [np.array([-1, -1, -1]), np.array([0, 0, 0])]
    for context in contexts:
        windows = np.column_stack([np.tile(context, (30, 1)), np.arange(30)])
        assert model.window_probs(windows).sum(axis=1) == pytest.approx(np.ones(4), abs=1e-12)


def test_large_vocabularies_do_not_overflow_keys():
    tokens = np.array([199_999, 5, 199_998, 7] * 5)
    model = fit_ngrams(tokens, np.array([20]), vocab_size=200_000, order=5)
    assert model.ngram_counts(np.array([[199_999, 5, 199_998, 7], [199_998, 7, 199_999, 5]])).tolist() == [5, 4]


def test_continuations_are_scored_after_the_end_of_the_prefix():
    log_probs, log_unigrams = toy().log_probs(np.array([2, 0, 1]), [np.array([0, 1]), np.array([3]), np.array([])])
    assert np.exp(log_probs) == pytest.approx([P3_0_AFTER_01, P3_1_AFTER_10, (0 + 2 * P2_3_AFTER_1) / 4])
    assert np.exp(log_unigrams) == pytest.approx([P1[0], P1[1], P1[3]])


def test_a_short_prefix_leaves_a_short_context():
    log_probs, _ = toy().log_probs(np.array([], dtype=np.int64), [np.array([0, 1])])
    assert np.exp(log_probs) == pytest.approx([P1[0], P2_1_AFTER_0])


def test_pooled_tokens_share_the_unigram_probability_of_all_of_them(tmp_path):
    model = toy(pooled=[3, 0])
    log_probs, log_unigrams = model.log_probs(np.array([], dtype=np.int64), [np.array([0, 1])])
    assert np.exp(log_probs) == pytest.approx([P1[0], P2_1_AFTER_0])
    assert np.exp(log_unigrams) == pytest.approx([P1[0] + P1[3], P1[1]])
    assert model.fingerprint() != toy().fingerprint()
    model.save(tmp_path / "judge.npz")
    assert NgramModel.load(tmp_path / "judge.npz").fingerprint() == model.fingerprint()


def test_repeated_passages_are_counted_once_with_a_dedup_window():
    passage = np.arange(10)
    model = fit_ngrams(np.concatenate([passage] * 3), np.array([10] * 3), vocab_size=10, order=2, dedup_window=4)
    # The first 3 tokens of a document have no window of 4 yet and are always counted.
    assert model.ngram_counts(passage[:, None]).tolist() == [3, 3, 3, 1, 1, 1, 1, 1, 1, 1]
    assert model.num_tokens == 16


def test_a_saved_model_is_the_same_model(tmp_path):
    model = toy(tokenizer_fingerprint="abc")
    model.save(tmp_path / "judge.npz")
    loaded = NgramModel.load(tmp_path / "judge.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["judge.npz"]
    assert (loaded.order, loaded.tokenizer_fingerprint, loaded.num_tokens) == (3, "abc", 7)
    assert loaded.fingerprint() == model.fingerprint() != toy(order=2).fingerprint()
    assert prob(loaded, 0, 1, 0) == prob(model, 0, 1, 0)


def test_a_broken_or_missing_model_file_is_named(tmp_path):
    path = tmp_path / "judge.npz"
    with pytest.raises(DataError, match="does not exist"):
        NgramModel.load(path)
    toy().save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"judge\.npz is not one of ours, or is cut off"):
        NgramModel.load(path)


def test_bad_corpora_are_refused():
    with pytest.raises(DataError, match="empty"):
        fit_ngrams(np.array([]), np.array([0]), vocab_size=4)
    with pytest.raises(DataError, match=r"0\.\.2, outside the vocabulary of 2"):
        fit_ngrams(TOKENS, LENGTHS, vocab_size=2)
    with pytest.raises(DataError, match="token id 4 is beyond the judge's vocabulary of 4"):
        toy().log_probs(np.array([0]), [np.array([4])])
