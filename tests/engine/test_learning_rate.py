"""The learning-rate schedule against Megatron-Core's scheduler and against numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.engine.config import EngineConfig
from megatron_sip.engine.lr import LearningRate
from megatron_sip.errors import ConfigurationError

STYLES: list[dict[str, Any]] = [
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "linear"},
    {"lr_decay_style": "cosine"},
    {"lr_decay_style": "inverse-square-root"},
    *({"lr_decay_style": "WSD", "lr_wsd_decay_style": s} for s in ("linear", "cosine", "exponential", "minus_sqrt")),
]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(style.values()))
def test_every_style_equals_megatrons_scheduler(style: dict[str, Any], warmup: int) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = EngineConfig(
        lr=3e-3, min_lr=2e-4, lr_warmup_iters=warmup, lr_warmup_init=1e-5, lr_wsd_decay_iters=7, **style
    )
    config.validate()
    group: dict[str, Any] = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=1e-5,
        max_lr=3e-3,
        min_lr=2e-4,
        lr_warmup_steps=warmup,
        lr_decay_steps=20,
        lr_decay_style=config.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=20,
        wd_incr_style="constant",
        wsd_decay_steps=7,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    ours = LearningRate.of(config, train_iters=20)
    for step in range(25):
        assert ours(step) == pytest.approx(group["lr"], rel=1e-12), step
        scheduler.step(1)


def test_cosine_with_warm_up_is_what_a_hand_computes() -> None:
    schedule = LearningRate.of(
        EngineConfig(lr=1.0, min_lr=0.1, lr_decay_style="cosine", lr_warmup_iters=4), train_iters=12
    )
    assert [schedule(step) for step in (0, 1, 4)] == [0.0, 0.25, 1.0]
    assert schedule(8) == pytest.approx(0.1 + 0.9 * 0.5)  # half way
    assert schedule(6) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))  # a quarter of the way
    assert schedule(12) == pytest.approx(0.1)
    assert schedule(100) == 0.1


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--lr-warmup-iters 20 .* 10 iterations"):
        LearningRate.of(EngineConfig(lr_warmup_iters=20), train_iters=10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"min_lr": 1.0}, "--min-lr 1.0 is not between 0 and --lr 0.0005"),
        ({"lr_decay_style": "WSD"}, "needs --lr-wsd-decay-iters"),
        ({"clip_grad": -1.0}, "--clip-grad is -1.0"),
        ({"adam_beta2": 1.0}, "--adam-beta2 is 1.0"),
        ({"max_skipped_steps": -1}, "--max-skipped-steps is -1"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        replace(EngineConfig(), **change).validate()
