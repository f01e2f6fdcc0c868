"""The figures of --dry-run against numbers worked out by hand, and against the model that ranks really build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.errors import ConfigurationError
from megatron_sip.model import PRESETS, ModelConfig, padded_vocab_size
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.train.config import train_config_from
from megatron_sip.train.dry_run import DryRun, dry_run, examine
from megatron_sip.train.estimate import stage_parameters
from tests.ranks import run_ranks

PAPER: dict[str, Any] = {
    "preset": "llama2-1.4b",
    "train_iters": 2000,
    "vocab_size": 32000,
    "tokenizer_model": "absent/tokenizer.model",
    "data_path": ["absent/corpus"],
    "valid_data_path": ["absent/held_out"],
    "judge_model": "absent/judge.npz",
    "candidates": "suffix,rollout:16",
    "judge_votes": 5,
    "bf16": True,
    "dry_run_device_gib": 80,
}
GIB = 2**30


def figures(world_size: int = 64, **changes: Any) -> DryRun:
    return examine(train_config_from({**PAPER, **changes}), world_size)


def test_the_papers_policy_has_1_345_423_360_parameters() -> None:
    # A layer: 4 matrices of 2048 x 2048, 3 of 2048 x 5504, 2 norms. Besides: embedding, output layer, last norm.
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5504 + 2 * 2048
    assert layer == 50_597_888
    assert 24 * layer + 2 * 32000 * 2048 + 2048 == 1_345_423_360
    run = figures()
    assert run.num_parameters == 1_345_423_360
    assert run.stages[0].parameters == 1_345_423_360  # 32,000 is a multiple of 128: no padding
    assert figures(preset="llama3.1-8b", vocab_size=128256).num_parameters == 8_030_261_248


def test_ranks_share_parameters_by_tensor_and_pipeline() -> None:
    stages = figures(tensor_model_parallel_size=2, pipeline_model_parallel_size=2).stages
    # Half of the matrices and all of the norms of 12 layers, half of the embedding; the last stage also has a norm.
    layer = (4 * 2048 * 2048 + 3 * 2048 * 5504) // 2 + 2 * 2048
    assert [stage.parameters for stage in stages] == [12 * layer + 32_768_000, 12 * layer + 32_768_000 + 2048]
    # 32,000 is not a multiple of 4 x 128: padded to 32,256.
    assert figures(tensor_model_parallel_size=4).vocab_rows == 32_256


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ({}, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (
            {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True, "qk_layernorm": True},
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
        ),
    ],
)
def test_ranks_really_have_the_parameters_that_are_counted(model: dict[str, Any], parallel: dict[str, int]) -> None:
    tp, pp = parallel.get("tensor_model_parallel_size", 1), parallel["pipeline_model_parallel_size"]
    payload = {"model": {"preset": "tiny", **model}, "parallel": parallel, "vocab_size": 1000}
    arch = ModelConfig(**payload["model"]).resolve()
    rows = padded_vocab_size(1000, 128, tp)
    for stage, count in run_ranks(tp * pp, "tests.config.claims:parameters_of_rank", payload):
        assert count == stage_parameters(arch, rows, stage, pp, tp)


def test_memory_of_a_rank_follows_from_its_parameters() -> None:
    count = 1_345_423_360
    (stage,) = figures().stages
    # bf16 weights and reference, fp32 gradients; fp32 weights and two moments split over 64 replicas.
    assert (stage.weights, stage.gradients, stage.reference) == (2 * count, 4 * count, 2 * count)
    assert stage.optimizer == -(-12 * count // 64)
    assert figures(use_distributed_optimizer=False).stages[0].optimizer == 12 * count
    full = figures(bf16=False).stages[0]
    assert (full.weights, full.gradients, full.optimizer) == (4 * count, 4 * count, 8 * count // 64)
    assert figures(accumulate_allreduce_grads_in_fp32=False).stages[0].gradients == 2 * count


def test_a_reference_is_counted_where_it_is() -> None:
    count = 1_345_423_360
    on_host = figures(reference_placement="host")
    # On the host: the reference and, while it is swapped in, the policy.
    assert (on_host.stages[0].reference, on_host.host_bytes) == (0, 4 * count)
    assert figures(reference_policy="ema").stages[0].reference == 4 * count
    assert figures(reference_policy="none").stages[0].reference == 0
    assert figures(objective="rf_nll", preference_rule="best").stages[0].reference == 0
    assert figures(curriculum="ntp").stages[0].reference == 0
    assert figures().host_bytes == 0
    assert figures(curriculum="ntp", reference_placement="host").host_bytes == 0


def test_the_cache_of_rollouts_holds_each_prefix_once() -> None:
    # 64 rows are 4 prefixes of 1,920 tokens and 64 rollouts of 128; keys and values of 16 x 128 in 24 layers, bf16;
    # and the fp32 logits of 64 rows.
    tokens = 4 * 1920 + 64 * 128
    assert figures().stages[0].kv_cache == tokens * 2 * 16 * 128 * 24 * 2 + 64 * 32000 * 4
    assert figures(curriculum="ntp").stages[0].kv_cache == 0
    # A replica that has one prefix a step does not hold four.
    alone = figures(256).stages[0].kv_cache
    assert alone == (1920 + 16 * 128) * 2 * 16 * 128 * 24 * 2 + 16 * 32000 * 4


def test_activations_of_one_layer_are_counted_by_hand() -> None:
    # One row of 1,920 + 2 x 128 tokens. Kept per token and layer: 4 x 2048 of residuals and norms, 3 x 2048 of q, k, v,
    # 2048 of attention, 3 x 5504 of SwiGLU; in bf16.
    per_token = (4 * 2048 + 3 * 2048 + 2048 + 3 * 5504) * 2
    plain = figures().stages[0]
    assert plain.activations == 2176 * per_token * 24
    # Under full recomputation: each layer's input, and one layer.
    recomputed = figures(recompute_granularity="full").stages[0]
    assert recomputed.activations == 2176 * (24 * 2048 * 2 + per_token)
    # 256 scored positions: logits and gradient in bf16, one copy in fp32.
    assert plain.logits == 256 * 32000 * (2 + 2 + 4)
    # 1F1B keeps as many micro-batches on the first of two stages as there are stages; each has half of the layers.
    first, last = figures(pipeline_model_parallel_size=2, global_batch_size=256).stages
    assert first.activations == 2 * last.activations == plain.activations
    assert (first.logits, last.logits) == (0, plain.logits)


def test_the_papers_runs_ask_for_174_080_votes_a_step() -> None:
    (phase,) = figures().phases
    assert phase.judge.pairs_per_group == 17 * 16 // 2 == 136
    assert phase.judge.total == 256 * 136 * 5 == 174_080
    assert phase.rollouts == 4096
    assert phase.tokens == 256 * (1920 + 2 * 128)
    assert phase.micro_batches == {"rollout": 4}


def test_judge_calls_follow_the_schedule_the_criteria_and_the_orders() -> None:
    def calls(**changes: Any) -> int:
        return figures(**changes).phases[-1].judge.total

    assert calls(pair_schedule="pivot") == 256 * 16 * 5
    assert calls(pair_schedule="circular") == 256 * 17 * 5
    assert calls(pair_schedule="best_worst") == 256 * 40 * 5
    assert calls(pair_schedule="best_worst", pair_budget=33) == 256 * 33 * 5
    assert calls(pair_order="both") == 2 * 174_080
    assert calls(judge_safety_weight=1) == 256 * (136 + 17) * 5
    assert calls(judge_safety_weight=1, judge_factuality_weight=1, judge_quality_weight=0) == 256 * 2 * 17 * 5
    assert calls(candidates="rewrite,rollout:1", preference_rule="rewrite>rollout") == 0
    assert calls(curriculum="ntp") == 0


def test_passes_over_the_corpus_follow_the_curriculum() -> None:
    scratch = {"train_iters": 21000, "dry_run_corpus_samples": 257154}
    assert figures(**scratch).passes["sip"] == pytest.approx(20.9, abs=0.05)
    # 100 steps of next-token windows alone, then a quarter of the batch is judged: 100 x 64 samples.
    mixed = figures(train_iters=200, dry_run_corpus_samples=6400, curriculum="ntp:100; ntp=0.75,rollout=0.25")
    assert mixed.passes["sip"] == 1.0
    assert [dict(phase.counts) for phase in mixed.phases] == [{"ntp": 256}, {"ntp": 192, "rollout": 64}]
    assert mixed.phases[1].tokens == 192 * 2048 + 64 * 2176


def test_samples_are_counted_where_the_corpus_is_at_hand(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=999))
    for name in ("corpus", "held_out"):
        with IndexedWriter(str(tmp_path / name), tokenizer.vocab_size) as writer:
            for _ in range(3):
                writer.add_document(np.arange(40))
            meta = CorpusMeta(
                tokenizer.fingerprint, "NullTokenizer", tokenizer.vocab_size, tokenizer.eod_id, False, 3, 120
            )
            writer.close(meta)
    run = figures(
        1, preset="tiny", tokenizer_type="NullTokenizer", vocab_size=999, data_path=[str(tmp_path / "corpus")],
        valid_data_path=[str(tmp_path / "held_out")], seq_length=20, suffix_length=10, train_iters=9,
    )  # fmt: skip
    # Each document of 40 tokens: cuts at 10, 20 and 30 have a prefix and 10 tokens to come.
    assert run.corpus_samples == {"sip": 9}
    assert run.passes == {"sip": 256.0}
    assert run.vocab_size == 1000  # NullTokenizer adds the end of a document


def test_many_passes_are_warned_of_and_few_are_not() -> None:
    few, many = ({**PAPER, "dry_run_corpus_samples": number} for number in (983520, 983))
    warning = "WARNING: beyond about 4 passes repeated text teaches less and less"
    assert warning not in dry_run(train_config_from(few), {"WORLD_SIZE": "64"})[0]
    assert warning in dry_run(train_config_from(many), {"WORLD_SIZE": "64"})[0]


def test_the_report_reads_as_expected() -> None:
    config = train_config_from({**PAPER, "dry_run_corpus_samples": 983520, "rollout_micro_batch_size": 2})
    report, is_ready = dry_run(config, {"WORLD_SIZE": "64"})
    assert not is_ready  # files are missing
    for part in (
        "1,345,423,360 parameters",
        "64 ranks = tensor 1 x pipeline 1 x data 64",
        "256 judged groups: 2 micro-batches on each of 64 replicas",
        "174,080 verdicts of the judge = 256 x (136 pairs x 5 votes)",
        "983,520 prefix-suffix samples: 0.5 passes",
        "--data-path: no file absent/corpus.bin and .idx; tools/preprocess_data.py writes them",
        "--judge-model: no file absent/judge.npz",
        "on a device of 80 GiB fits",
    ):
        assert part in report
    assert max(len(line) for line in report.splitlines()) <= 110
    small = train_config_from({**PAPER, "dry_run_device_gib": 12.0, "dry_run_world_size": 8})
    report, _ = dry_run(small, {})
    assert "on a device of 12 GiB does NOT fit: lower" in report
    assert report.rstrip().endswith("This run cannot start: 4 missing and it does not fit.")


def test_without_a_device_the_ranks_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=48 * GIB))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = train_config_from({**PAPER, "dry_run_device_gib": None})
    report, _ = dry_run(config, {})
    assert "GiB on a share of 48.0 GiB fits" in report
    assert "(no GPU here: 48 GiB of memory for all ranks; --dry-run-device-gib names a device)" in report
    assert examine(config, 1).device_bytes == 48 * GIB
    two = examine(config, 2)
    assert (two.device_bytes, two.fits) == (24 * GIB, two.peak <= 24 * GIB)


def test_phases_that_are_never_reached_are_not_listed_and_one_that_is_cut_short_says_so() -> None:
    curriculum = "ntp:30:name=warm-up; ntp=0.5,rollout=0.5:20:name=mixed; rollout:name=rest"
    assert [(p.name, p.steps) for p in figures(train_iters=100, curriculum=curriculum).phases] == [
        ("warm-up", 30), ("mixed", 20), ("rest", None)
    ]  # fmt: skip
    cut = figures(train_iters=40, curriculum=curriculum)
    assert [(p.name, p.steps) for p in cut.phases] == [("warm-up", 30), ("mixed", 10)]
    assert [p.name for p in figures(train_iters=30, curriculum=curriculum).phases] == ["warm-up"]


def test_an_unknown_vocabulary_is_asked_for() -> None:
    with pytest.raises(ConfigurationError, match=r"absent/tokenizer\.model is not at hand.*give --vocab-size"):
        figures(vocab_size=None)


def test_the_tiny_preset_is_counted_by_hand() -> None:
    tiny = PRESETS["tiny"]
    # 4 heads of 40 and 2 key-value groups: q is 160 wide, k and v 80 each.
    layer = 160 * (160 + 2 * 80) + 160 * 160 + 3 * 160 * 432 + 2 * 160
    assert stage_parameters(tiny, 1000, 0, 1) == 4 * layer + 2 * 1000 * 160 + 160
