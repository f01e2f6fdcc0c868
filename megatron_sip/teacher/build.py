"""TeacherConfig -> the panel that the teacher process serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.corrupter import Corrupter, RuleCorrupter
from megatron_sip.teacher.factuality import OverlapFactualityJudge
from megatron_sip.teacher.interfaces import Judge, ModelSource, PairwiseJudge, PointwiseJudge, RemotePart, Rewriter
from megatron_sip.teacher.ledger import Archive, Ledger, RawPolicy
from megatron_sip.teacher.ngram import NgramModel
from megatron_sip.teacher.panel import Panel, PanelSettings
from megatron_sip.teacher.quality import NgramQualityJudge
from megatron_sip.teacher.replay import Replay, ReplayedQualityJudge
from megatron_sip.teacher.rewriter import CopyRewriter, RuleRewriter
from megatron_sip.teacher.safety import WordListSafetyJudge, load_words
from megatron_sip.teacher.sources import Recording, Unrecorded, VerdictSource

if TYPE_CHECKING:
    from megatron_sip.teacher.http.build import HttpTeacher


def build_teacher(
    config: TeacherConfig,
    tokenizer_fingerprint: str = "",
    judging: bool = True,
    rewriting: bool = True,
    replica: int = 0,
    num_replicas: int = 1,
    seed: int = 0,
    models: ModelSource | None = None,
) -> Panel:
    """The teacher; without ``judging`` it only rewrites and needs no judge, without ``rewriting`` it copies.

    ``replica`` of ``num_replicas`` teachers of the run: each has a ledger of its own, and limits of the whole run are
    split over them. ``seed`` draws the order in which a pair is shown. ``models``: checkpoints of ours, which only a
    process with Megatron-Core can hold (``train.model_teacher``). Raises ConfigurationError or DataError for what is
    missing or does not fit (judge model, endpoints, templates, ledger).
    """
    archive = Archive(Path(config.replay_judgments)) if config.replay_judgments else None
    http: HttpTeacher | None = None
    if config.http_roles(judging, rewriting):
        http = _http(config, replica, num_replicas, replaying=archive is not None)
    quality: PairwiseJudge | None = None
    coherence: PairwiseJudge | None = None
    pointwise: list[PointwiseJudge] = []
    if judging and http is not None and config.teacher == "http":
        quality = http.judge("quality") if "quality" in config.criteria else None
        coherence = http.judge("coherence") if "coherence" in config.criteria else None
        pointwise += [http.judge(c) for c in ("safety", "factuality") if c in config.criteria]
    elif judging and config.teacher == "model":
        own = _models(models)
        quality = own.judge("quality") if "quality" in config.criteria else None
        pointwise += [own.judge("safety")] if "safety" in config.criteria else []
    elif judging:
        quality = _embedded_quality(config, tokenizer_fingerprint, archive)
        pointwise = _embedded_pointwise(config)
    return Panel(
        quality,
        pointwise,
        _rewriter(config, http if rewriting else None, models if rewriting else None),
        _settings(config, seed),
        _source(config, archive, replica),
        coherence=coherence,
        remote=http if archive is None else None,
    )


def build_judge(
    config: TeacherConfig, criterion: str, tokenizer_fingerprint: str = "", models: ModelSource | None = None
) -> tuple[Judge, RemotePart | None]:
    """One judge by itself, to be asked vote by vote, and what is to be closed after it. Raises as ``build_teacher``."""
    if config.teacher == "http":
        http = _http(config, 0, 1)
        return http.judge(criterion), http
    if config.teacher == "model":
        return _models(models).judge(criterion), None
    alone = dataclasses.replace(
        config,
        judge_quality_weight=float(criterion == "quality"),
        judge_safety_weight=float(criterion == "safety"),
        judge_factuality_weight=float(criterion == "factuality"),
    )
    quality = _embedded_quality(alone, tokenizer_fingerprint, None)
    judges: list[Judge] = [*_embedded_pointwise(alone)] if quality is None else [quality]
    if not judges:
        raise ConfigurationError(f"the embedded teacher has no judge of {criterion}: give --teacher http")
    return judges[0], None


def build_corrupter(
    config: TeacherConfig, kinds: Sequence[str], share: float, seed: int
) -> tuple[Corrupter, RemotePart | None]:
    """A strong model with ``--teacher http``, else rules; and what is to be closed after it."""
    if config.teacher != "http":
        return RuleCorrupter(kinds, share, seed), None
    http = _http(config, 0, 1)
    return http.corrupter(), http


def _http(config: TeacherConfig, replica: int, num_replicas: int, replaying: bool = False) -> HttpTeacher:
    # Only here, so that the embedded teacher starts without an HTTP library.
    from megatron_sip.teacher.http.build import HttpTeacher

    return HttpTeacher(config, replica, num_replicas, replaying=replaying)


def _settings(config: TeacherConfig, seed: int) -> PanelSettings:
    return PanelSettings(
        weights=config.weights,
        pair_schedule=config.pair_schedule,
        pair_pivot=config.pair_pivot,
        pair_order=config.pair_order,
        votes=config.judge_votes,
        criterion_votes={criterion: config.votes_of(criterion) for criterion in config.criteria},
        pair_budget=config.pair_budget,
        seed=seed,
    )


def _source(config: TeacherConfig, archive: Archive | None, replica: int) -> VerdictSource:
    if archive is not None:
        return Replay(archive, replica)
    if not config.judge_ledger:
        return Unrecorded()
    policy = RawPolicy(config.ledger_raw, config.ledger_sample)
    return Recording(Ledger(Path(config.judge_ledger), replica, policy, round(config.ledger_rotate_mib * 2**20)))


def _embedded_quality(config: TeacherConfig, fingerprint: str, archive: Archive | None) -> PairwiseJudge | None:
    if not config.judge_quality_weight:
        return None
    if archive is not None:
        # The model only tells which of several recorded judges is meant.
        known = _judge_model(config, fingerprint) if Path(config.judge_model or "-").is_file() else None
        return ReplayedQualityJudge(archive, config.quality_recipe, known.fingerprint() if known else None)
    return NgramQualityJudge(_judge_model(config, fingerprint), config.quality_recipe)


def _embedded_pointwise(config: TeacherConfig) -> list[PointwiseJudge]:
    pointwise: list[PointwiseJudge] = []
    if config.judge_safety_weight:
        pointwise.append(WordListSafetyJudge(load_words(config.safety_words)))
    if config.judge_factuality_weight:
        pointwise.append(OverlapFactualityJudge())
    return pointwise


def _models(models: ModelSource | None) -> ModelSource:
    if models is None:
        raise ConfigurationError(
            "--teacher model and --rewriter model need a process with Megatron-Core, which this tool does not start: "
            "export the model and serve it, and use http"
        )
    return models


def _rewriter(config: TeacherConfig, http: HttpTeacher | None, models: ModelSource | None) -> Rewriter:
    """Without a server to ask where the configuration wants one, nothing is rewritten in this process: copies."""
    kind = config.rewriter_kind
    if kind == "model" and models is not None:
        return models.rewriter()
    if kind == "http" and http is not None:
        return http.rewriter()
    return RuleRewriter(load_words(config.safety_words)) if kind == "rule" else CopyRewriter()


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
