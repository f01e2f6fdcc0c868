"""Covers the embedded teacher as a run uses it: fitted on a corpus on disk by the tool, in its process, by types."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sip.config import from_mapping
from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.teacher import TeacherConfig, TeacherProcess
from megatron_sip.teacher.convert import (
    judge_request,
    judgments,
    rewrite_candidates,
    rewrite_request,
    rewriter_sums,
)
from megatron_sip.teacher.interfaces import Rewrite, RewriteResult
from megatron_sip.teacher.ngram import NgramModel
from megatron_sip.tokenizer.base import Tokenizer
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Sample
from tests.teacher.docs_text import SUFFIX, Corpus

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fit_judge.py"


class Words(Tokenizer):
    """Ids are words, joined by blanks; the last id ends a document."""

    def __init__(self, words):
        self.words = words
        self.ids = {word: i for i, word in enumerate(words)}
        self.vocab_size = len(words) + 1
        self.eod_id = len(words)
        self.fingerprint = "words"

    def encode(self, text):
        return [self.ids[word] for word in text.split(" ") if word]

    def encode_continuation(self, text):
        return self.encode(text)

    def decode(self, tokens):
        return " ".join(self.words[int(t)] for t in tokens if int(t) != self.eod_id)


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def judge_path(corpus, tmp_path_factory):
    """The judge split as .bin/.idx, and what the tool makes of it."""
    folder = tmp_path_factory.mktemp("judge")
    with IndexedWriter(str(folder / "split"), corpus.vocab_size + 1) as writer:
        for document in corpus.judge:
            writer.add_document(np.append(document, corpus.vocab_size))
        writer.close(meta_of(writer, corpus))
    assert run_tool(folder, "--output", folder / "judge.npz") is None
    return folder / "judge.npz"


def meta_of(writer, corpus):
    return CorpusMeta(
        tokenizer_fingerprint="words",
        tokenizer_type="NullTokenizer",
        vocab_size=corpus.vocab_size + 1,
        eod_id=corpus.vocab_size,
        append_eod=True,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
    )


def run_tool(folder, *arguments):
    """Exit message of the tool, None if all went well. In this process: importing Megatron-Core takes seconds."""
    spec = importlib.util.spec_from_file_location("fit_judge", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fit_judge.py", "--data-path", str(folder / "split"), *map(str, arguments)])
        try:
            module.main()
        except SystemExit as end:
            return str(end.code)
    return None


def groups_of(corpus, number):
    """Real suffix, shuffled suffix, one repeated token, per held-out sample."""
    rng, groups = np.random.default_rng(0), []
    for i, (prefix, suffix) in enumerate(corpus.samples(number)):
        rollouts = (rng.permutation(suffix), np.full(SUFFIX, suffix[0]))
        candidates = [Candidate(CandidateKind.SUFFIX, suffix)]
        candidates += [Candidate(CandidateKind.ROLLOUT, tokens, rollout=k) for k, tokens in enumerate(rollouts)]
        groups.append(CandidateGroup(Sample(i, 0, prefix, suffix), tuple(candidates)))
    return groups


def test_the_fitted_teacher_ranks_real_text_over_shuffled_over_loops(corpus, judge_path, tmp_path):
    groups = groups_of(corpus, 40)
    config = TeacherConfig(
        judge_model=str(judge_path), judge_safety_weight=1.0, judge_ledger=str(tmp_path / "ledger.sqlite")
    )
    tokenizer = Words(corpus.words)
    with TeacherProcess(config, {"tokenizer_fingerprint": "words"}) as teacher:
        for ticket in range(2):
            teacher.submit(ticket, judge_request(groups, tokenizer, learn=False))
        results = [teacher.collect(ticket) for ticket in range(2)]
    found, again = (judgments(result.groups) for result in results)
    quality = np.mean([judgment.criteria["quality"] for judgment in found], axis=0)
    assert quality[0] > 0.8
    assert quality[2] < 0.1
    for one, other in zip(found, again, strict=True):
        assert np.array_equal(one.scores, one.criteria["quality"] + one.criteria["safety"])
        assert np.array_equal(one.scores, other.scores)
    # 3 pairs and 3 safety questions per group; the second time, at least, all came from the ledger (safety sees the
    # candidate alone, and some loops are the same for several prefixes).
    num_calls = sum(group.num_calls for result in results for group in result.groups)
    num_cached = sum(result.num_cached for result in results)
    assert num_calls + num_cached == 2 * 40 * 6
    assert num_cached >= 40 * 6
    assert {group.num_comparisons for result in results for group in result.groups} == {3}
    latencies = np.concatenate([result.latencies_s for result in results])
    assert 0 < np.percentile(latencies, 99) < 10


def test_running_statistics_of_the_process_can_be_put_back(corpus, judge_path):
    groups, tokenizer = groups_of(corpus, 12), Words(corpus.words)
    config = TeacherConfig(judge_model=str(judge_path))
    with TeacherProcess(config) as teacher:
        teacher.submit(0, judge_request(groups, tokenizer))
        teacher.collect(0)
        state = teacher.state_dict()
    assert len(state["quality"]["keys"]) > 0
    with TeacherProcess(config) as teacher:
        teacher.load_state_dict(state)
        restored = teacher.state_dict()
    assert np.array_equal(restored["quality"]["counts"], state["quality"]["counts"])


def test_the_tool_takes_disjoint_documents_for_a_second_judge(corpus, judge_path):
    folder = judge_path.parent
    for part in ("0/2", "1/2"):
        output = folder / f"part{part[0]}.npz"
        assert run_tool(folder, "--output", output, "--documents", part, "--order", 5, "--dedup-window", 0) is None
    first, second = (NgramModel.load(folder / f"part{part}.npz") for part in (0, 1))
    lengths = [len(document) + 1 for document in corpus.judge]
    assert (first.order, first.num_tokens, second.num_tokens) == (5, sum(lengths[::2]), sum(lengths[1::2]))
    assert first.tokenizer_fingerprint == "words"


def test_the_tool_names_what_is_wrong_in_one_line(judge_path, tmp_path, capsys):
    for arguments, words in [
        (["--output", tmp_path / "x.npz", "--order", 0], "--order 0"),
        (["--output", tmp_path / "x.npz", "--documents", "2/2"], "PART/PARTS"),
        (["--output", tmp_path / "x.npz", "--dedup-window", 2], "dedup window of 2"),
    ]:
        message = run_tool(judge_path.parent, *arguments)
        assert message is not None
        assert words in message + capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_a_judge_that_is_missing_or_of_another_tokenizer_stops_the_run_at_its_start(judge_path):
    with pytest.raises(ConfigurationError, match="judge-model is not set"):
        TeacherProcess(TeacherConfig())
    with pytest.raises(DataError, match="fitted with tokenizer words, this run uses sha256:1"):
        TeacherProcess(TeacherConfig(judge_model=str(judge_path)), {"tokenizer_fingerprint": "sha256:1"})


def test_a_run_without_a_judge_rewrites_without_a_judge_model():
    tokenizer = Words(["a", "long", "line", "of", "text", "here\n"])
    sample = Sample(0, 0, np.array([0]), np.array([0, 1, 2, tokenizer.eod_id]))
    with TeacherProcess(TeacherConfig(), {"judging": False}) as teacher:
        teacher.submit(0, rewrite_request([sample], tokenizer))
        (candidate,) = rewrite_candidates(teacher.collect(0), [sample], tokenizer, max_tokens=8)
    assert candidate.tokens.tolist() == sample.suffix.tolist()


def test_rewrites_become_candidates_of_at_most_n_tokens():
    tokenizer = Words(["a", "b", "c", "d"])
    eod = tokenizer.eod_id
    samples = [Sample(i, 0, np.array([0]), np.array(suffix)) for i, suffix in enumerate([[0, 1], [0, eod], [2], [3]])]
    result = RewriteResult(
        (Rewrite("c a d"), Rewrite("b"), Rewrite(None, failure="refused"), Rewrite("d", copied=True))
    )
    candidates = rewrite_candidates(result, samples, tokenizer, max_tokens=2)
    assert [None if c is None else c.tokens.tolist() for c in candidates] == [[2, 0], [1, eod], None, [3]]
    assert all(c.kind is CandidateKind.REWRITE for c in candidates if c is not None)
    sums = rewriter_sums(samples, candidates)
    # Shares of the suffix's tokens kept: 1/2 (a), 1/2 (end of document), 1.
    assert sums == {
        "rewriter/exact_match": (1.0, 3.0),
        "rewriter/token_overlap": (2.0, 3.0),
        "rewriter/failed": (1.0, 4.0),
    }


def test_options_come_from_yaml_and_bad_ones_are_named():
    config = from_mapping(TeacherConfig, {"quality_settings": {"token_cap": 1}, "judge_votes": 5})
    assert config.quality_recipe.token_cap == 1
    for changes, words in [
        ({"judge_quality_weight": 0.0}, "all judge weights are 0"),
        ({"judge_safety_weight": -1.0}, r"judge-safety-weight is -1\.0"),
        ({"judge_votes": 0}, "judge-votes is 0"),
        ({"judge_timeout_s": 0.0}, r"judge-timeout-s is 0\.0"),
        ({"judge_queue": 0}, "judge-queue is 0"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            TeacherConfig(**changes).validate()
