"""TeacherConfig -> the panel that the teacher process serves."""

from __future__ import annotations

from pathlib import Path

from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.factuality import OverlapFactualityJudge
from megatron_sip.teacher.interfaces import PairwiseJudge, PointwiseJudge, Rewriter
from megatron_sip.teacher.ledger import Ledger
from megatron_sip.teacher.ngram import NgramModel
from megatron_sip.teacher.panel import Panel, PanelSettings
from megatron_sip.teacher.quality import NgramQualityJudge
from megatron_sip.teacher.rewriter import CopyRewriter, RuleRewriter
from megatron_sip.teacher.safety import WordListSafetyJudge, load_words


def build_teacher(config: TeacherConfig, tokenizer_fingerprint: str = "", judging: bool = True) -> Panel:
    """The embedded teacher; without ``judging`` it only rewrites, and needs no judge model.

    Raises ConfigurationError or DataError for a judge model that is missing or does not fit.
    """
    words = load_words(config.safety_words)
    quality: PairwiseJudge | None = None
    if judging and config.judge_quality_weight:
        quality = NgramQualityJudge(_judge_model(config, tokenizer_fingerprint), config.quality_recipe)
    pointwise: list[PointwiseJudge] = []
    if judging and config.judge_safety_weight:
        pointwise.append(WordListSafetyJudge(words))
    if judging and config.judge_factuality_weight:
        pointwise.append(OverlapFactualityJudge())
    rewriter: Rewriter = CopyRewriter() if config.rewriter == "copy" else RuleRewriter(words)
    settings = PanelSettings(
        weights=config.weights,
        pair_schedule=config.pair_schedule,
        pair_pivot=config.pair_pivot,
        pair_order=config.pair_order,
        votes=config.judge_votes,
    )
    return Panel(
        quality, pointwise, rewriter, settings, Ledger(Path(config.judge_ledger)) if config.judge_ledger else None
    )


def _judge_model(config: TeacherConfig, tokenizer_fingerprint: str) -> NgramModel:
    if not config.judge_model:
        raise ConfigurationError(
            "judge-model is not set: fit the embedded quality judge with tools/fit_judge.py, or set "
            "judge-quality-weight to 0"
        )
    model = NgramModel.load(Path(config.judge_model))
    if tokenizer_fingerprint and model.tokenizer_fingerprint not in ("", tokenizer_fingerprint):
        raise DataError(
            f"judge model {config.judge_model} was fitted with tokenizer {model.tokenizer_fingerprint}, this run uses "
            f"{tokenizer_fingerprint}: fit it again with tools/fit_judge.py"
        )
    return model
