"""Between the run's types and the teacher's messages. Only the trainer imports this: it needs torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sip.teacher.interfaces import (
    GroupVerdict,
    IntArray,
    JudgeGroup,
    JudgeRequest,
    Passage,
    RewriteItem,
    RewriteRequest,
    RewriteResult,
)
from megatron_sip.tokenizer.base import Tokenizer
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Judgment, Sample


def judge_request(
    groups: Sequence[CandidateGroup], tokenizer: Tokenizer, learn: bool = True, step: int | None = None
) -> JudgeRequest:
    """Groups of candidates with their texts; the reference is the sample's suffix.

    ``learn`` False (evaluation, probes) leaves running statistics of the judges as they are. ``step``: optimizer steps
    before it, for the ledger; None outside of training.
    """
    return JudgeRequest(tuple(_judge_group(group, tokenizer) for group in groups), learn=learn, step=step)


def _judge_group(group: CandidateGroup, tokenizer: Tokenizer) -> JudgeGroup:
    prefix = group.sample.prefix
    return JudgeGroup(
        sample_id=group.sample.sample_id,
        prefix=Passage(prefix, tokenizer.decode(prefix)),
        reference=_continuation(prefix, group.sample.suffix, tokenizer),
        candidates=tuple(_continuation(prefix, candidate.tokens, tokenizer) for candidate in group.candidates),
        kinds=tuple(candidate.kind.value for candidate in group.candidates),
    )


def _continuation(prefix: IntArray, tokens: IntArray, tokenizer: Tokenizer) -> Passage:
    return Passage(tokens, tokenizer.decode_continuation(prefix, tokens))


def judgments(verdicts: Sequence[GroupVerdict]) -> list[Judgment]:
    """The panel's verdicts in the run's types, in their order."""
    return [
        Judgment(
            scores=group.scores,
            criteria=dict(group.criteria),
            num_calls=group.num_calls,
            num_failures=group.num_failures,
            latency_s=group.latency_s,
        )
        for group in verdicts
    ]


def rewrite_request(samples: Sequence[Sample], tokenizer: Tokenizer, step: int | None = None) -> RewriteRequest:
    """Samples with their texts."""
    return RewriteRequest(
        tuple(
            RewriteItem(
                sample_id=sample.sample_id,
                prefix=Passage(sample.prefix, tokenizer.decode(sample.prefix)),
                suffix=_continuation(sample.prefix, sample.suffix, tokenizer),
            )
            for sample in samples
        ),
        step=step,
    )


def rewrite_candidates(
    result: RewriteResult, samples: Sequence[Sample], tokenizer: Tokenizer, max_tokens: int
) -> list[Candidate | None]:
    """One candidate of at most ``max_tokens`` tokens per sample; None where there is no rewrite.

    A copy keeps the suffix's tokens. A new text is encoded as a continuation and cut; if the suffix ended its document
    and the rewrite was not cut, so does the rewrite.
    """
    candidates: list[Candidate | None] = []
    for rewrite, sample in zip(result.rewrites, samples, strict=True):
        if rewrite.text is None:
            candidates.append(None)
            continue
        ids = sample.suffix if rewrite.copied else tokenizer.encode_continuation(rewrite.text)
        tokens = np.asarray(ids, dtype=np.int64)[:max_tokens]
        ended = len(sample.suffix) > 0 and int(sample.suffix[-1]) == tokenizer.eod_id
        if ended and not rewrite.copied and 0 < len(tokens) < max_tokens:
            tokens = np.append(tokens, sample.suffix[-1:])
        candidates.append(Candidate(CandidateKind.REWRITE, tokens) if len(tokens) else None)
    return candidates


def rewriter_sums(samples: Sequence[Sample], candidates: Sequence[Candidate | None]) -> dict[str, tuple[float, float]]:
    """``rewriter/exact_match`` and ``rewriter/token_overlap`` as (sum, count), ``rewriter/failed`` over all samples.

    Token overlap: share of the suffix's tokens, as a multiset, that the rewrite holds too.
    """
    exact = overlap = count = 0.0
    for sample, candidate in zip(samples, candidates, strict=True):
        if candidate is None or not len(sample.suffix):
            continue
        count += 1
        exact += float(np.array_equal(candidate.tokens, sample.suffix))
        ids, wanted = np.unique(sample.suffix, return_counts=True)
        given = np.array([np.count_nonzero(candidate.tokens == token) for token in ids])
        overlap += float(np.minimum(wanted, given).sum()) / len(sample.suffix)
    failed = float(sum(candidate is None for candidate in candidates))
    return {
        "rewriter/exact_match": (exact, count),
        "rewriter/token_overlap": (overlap, count),
        "rewriter/failed": (failed, float(len(candidates))),
    }
