"""Operations and bytes of the planner against numbers worked out by hand."""

from __future__ import annotations

import pytest

from megatron_sip.model import PRESETS
from megatron_sip.train.plan import costs
from megatron_sip.train.plan.costs import Rows, Share

PAPER = PRESETS["llama2-1.4b"]
TINY = Share(PRESETS["tiny"], num_layers=4, vocab_size=1000, weight_bytes=4)
# tiny: h 160, 4 heads and 2 groups of 40, f 432. A layer's matrices: q and projection 160 x 160 each, k and v
# 160 x 80 each, three of 160 x 432.
TINY_LAYER = 2 * 160 * 160 + 2 * 160 * 80 + 3 * 160 * 432


def test_next_token_operations_are_those_of_megatrons_formula() -> None:
    # Megatron-LM, training.py, num_floating_point_operations, for a causal SwiGLU model, written out:
    # 12 B S L h^2 (1 + g/n + S/(2h) + 3/2 f/h + V/(2 L h)), with g = n = 16.
    batch, length, layers, hidden, ffn, vocabulary = 256, 2048, 24, 2048, 5504, 32000
    inner = 1 + 1 + length / (2 * hidden) + 1.5 * ffn / hidden + vocabulary / (2 * layers * hidden)
    expected = 12 * batch * length * layers * hidden**2 * inner
    assert expected == pytest.approx(6.3331e14 * 6.85677, rel=1e-4)
    share = Share(PAPER, num_layers=24, vocab_size=32000, weight_bytes=2)
    found = costs.train(share, Rows(256, 2048, 2048), recomputes_logits=False)
    assert found.flops == pytest.approx(expected, rel=1e-12)


def test_a_dpo_row_shares_its_prefix() -> None:
    rows = Rows(num_rows=3, width=64, attended=50, num_candidates=2, candidate_tokens=16)
    assert (rows.tokens, rows.scored) == (3 * (64 + 32), 3 * 32)
    # Pairs of a row: prefix with itself 64^2 / 2, each candidate with the real prefix 16 x 50, with itself 16^2 / 2.
    assert rows.pairs == 3 * (2048 + 2 * (800 + 128))
    work = costs.forward(TINY, rows)
    assert work.matmul_flops == 2 * (288 * 4 * TINY_LAYER + 96 * 1000 * 160)
    assert work.attention_flops == 4 * 160 * 3 * 3904 * 4  # 160 is 4 heads of 40
    assert costs.train(TINY, rows, recomputes_logits=False).flops == 3 * work.flops
    # DPO's backward pass computes the logits of the scored positions again.
    assert costs.train(TINY, rows, recomputes_logits=True).flops == 3 * work.flops + 2 * 96 * 1000 * 160


def test_a_decode_step_reads_weights_once_and_each_prefix_once() -> None:
    step = costs.decode_step(TINY, num_groups=3, slots=5, width=100, own_tokens=7)
    rows = 15
    assert step.matmul_flops == 2 * rows * (4 * TINY_LAYER + 160 * 1000)
    assert step.weight_bytes == 4 * (4 * TINY_LAYER + 160 * 1000)
    # Keys and values of a token: 4 layers x 2 x 2 groups x 40 x 4 bytes = 2,560 bytes.
    assert step.cache_bytes == 2560 * (3 * 100 + 15 * 7)
    assert step.attention_flops == 4 * 160 * rows * 107 * 4


def test_keys_and_values_of_the_papers_policy() -> None:
    # 24 layers x 2 x 16 heads x 128 x 2 bytes.
    share = Share(PAPER, num_layers=24, vocab_size=32000, weight_bytes=2)
    assert share.cache_bytes_per_token == 196_608
    assert Share(PAPER, 24, 32000, 2, tp=4).cache_bytes_per_token == 49_152


def test_the_first_token_comes_from_the_prefill() -> None:
    one = costs.decode_step(TINY, 2, 2, 10, 4.0)
    assert costs.decode(TINY, 2, 2, 10, new_tokens=8).matmul_flops == 7 * one.matmul_flops
    assert costs.decode(TINY, 2, 2, 10, new_tokens=8).cache_bytes == 7 * one.cache_bytes
    assert costs.decode(TINY, 2, 2, 10, new_tokens=1).flops == 0
    read = costs.prefill(TINY, num_groups=2, width=10)
    # All 20 tokens through the layers, two through the output layer.
    assert read.matmul_flops == 2 * (20 * 4 * TINY_LAYER + 2 * 160 * 1000)


def test_tensor_parallel_ranks_share_products_and_send_hidden_states() -> None:
    rows = Rows(2, 64, 64)
    whole, half = costs.forward(TINY, rows), costs.forward(Share(PRESETS["tiny"], 4, 1000, 4, tp=2), rows)
    assert half.flops == whole.flops / 2
    # Two sums of [128, 160] float32 in each of 4 layers, one of what is looked up; of the 128 positions' softmax a
    # maximum and two sums. A ring of two ranks sends 2 x 1/2 of each.
    assert (half.collectives, half.sent_bytes) == (8 + 1 + 2, 9 * 128 * 160 * 4 + 128 * 3 * 4)
    both = costs.train(Share(PRESETS["tiny"], 4, 1000, 4, tp=2), rows, recomputes_logits=False)
    # As measured: 16 in the layers, 1 + 2 as above, 1 of the gradient that the output layer gives.
    assert (both.collectives, both.sent_bytes) == (20, (17 + 1) * 128 * 160 * 4 + 128 * 3 * 4)
    assert costs.all_reduce_bytes(100, 4) == 150


def test_the_optimizer_moves_what_adam_reads_and_writes() -> None:
    # float32: gradient four times, two moments and the weight read and written: 4 x 4 + 6 x 4 = 40 bytes.
    assert costs.optimizer(1000, 4, 4, 1, shards=1).moved_bytes == 40_000
    # bf16 weights are written besides; two replicas share the work.
    assert costs.optimizer(1000, 4, 2, 1, shards=2).moved_bytes == 21_000
