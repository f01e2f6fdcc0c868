"""Covers the ledger as record and as cache: votes, failures, rotation, foreign files, and writers that are killed."""

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from megatron_sip.errors import DataError
from megatron_sip.teacher.interfaces import JudgeGroup, JudgeIdentity, Passage, Verdict
from megatron_sip.teacher.ledger import Archive, Asked, Context, Ledger, RawPolicy
from megatron_sip.teacher.ledger.bloom import Bloom
from megatron_sip.teacher.ledger.files import segment_path, segments
from megatron_sip.teacher.ledger.records import decompressed

JUDGE = JudgeIdentity("judge", "model", "T=1")
EMPTY = Passage(np.zeros(0, dtype=np.int64), "")
ONE_FILE = 2**40


def prompt(number):
    return random.Random(number).randbytes(16)


def asked(number=0, vote=0):
    return Asked(prompt(number), vote)


def context(sample_id=1, step=None, texts=("a", "b")):
    passages = tuple(Passage(EMPTY.tokens, text) for text in texts)
    return Context(sample_id, step, JudgeGroup(sample_id, passages[0], EMPTY, passages, ("suffix", "rollout")))


def add(ledger, *verdicts, identity=JUDGE, criterion="quality", about=None):
    ledger.add(criterion, identity, about or context(), [(key, (0, 1), verdict) for key, verdict in verdicts])


def find(ledger, *keys, identity=JUDGE, criterion="quality"):
    found = ledger.find(criterion, identity, keys)
    return [found[key].score if key in found else None for key in keys]


def rows(path, sql):
    with sqlite3.connect(segment_path(path, 0, 1)) as db:
        return db.execute(sql).fetchall()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def test_a_hundred_votes_on_one_question_are_a_hundred_verdicts(path):
    ledger = Ledger(path)
    keys = [asked(vote=v) for v in range(100)]
    add(ledger, *((key, Verdict(float(key.vote % 2), raw=str(key.vote), latency_s=0.25)) for key in keys))
    ledger.close()
    again = Ledger(path)
    assert again.count() == 100
    assert find(again, *keys) == [v % 2 for v in range(100)]
    kept = again.find("quality", JUDGE, keys, with_raw=True)
    assert [(kept[key].raw, kept[key].latency_s) for key in keys] == [(str(v), 0.25) for v in range(100)]


def test_a_verdict_is_found_only_under_everything_that_made_it(path):
    ledger = Ledger(path)
    add(ledger, (asked(), Verdict(1.0)))
    assert find(ledger, asked(1), asked(vote=1)) == [None, None]
    assert find(ledger, asked(), criterion="safety") == [None]
    for other in (("other", "model", "T=1"), ("judge", "newer", "T=1"), ("judge", "model", "T=0")):
        assert find(ledger, asked(), identity=JudgeIdentity(*other)) == [None]
    assert find(ledger, asked()) == [1.0]


def test_a_failure_is_recorded_but_asked_again_and_stays_beside_the_answer(path):
    ledger = Ledger(path)
    add(ledger, (asked(), Verdict(math.nan, raw="garbage", failure="unparsable: no verdict")))
    assert find(ledger, asked()) == [None] and ledger.count() == 1
    add(ledger, (asked(), Verdict(0.0)))
    assert find(ledger, asked()) == [0.0] and ledger.count() == 2
    found = rows(path, "SELECT score, failure, message FROM verdicts")
    assert found == [(None, "unparsable", "unparsable: no verdict"), (0.0, None, None)]
    ((recorded),) = Archive(path).find("quality", JUDGE, {asked()}).values()
    assert [(math.isnan(r.verdict.score), r.verdict.failure) for r in recorded] == [
        (True, "unparsable: no verdict"),
        (False, ""),
    ]


def test_many_keys_are_looked_up_in_one_call(path):
    ledger = Ledger(path)
    add(ledger, *((asked(i), Verdict(1.0)) for i in range(0, 3000, 2)))
    assert [score is not None for score in find(ledger, *map(asked, range(3000)))] == [i % 2 == 0 for i in range(3000)]


def test_a_ledger_goes_on_in_a_new_file_and_a_query_sees_them_all(path):
    ledger = Ledger(path, limit_bytes=200_000)
    for batch in range(40):
        add(ledger, *((asked(batch * 1000 + i), Verdict(i / 100)) for i in range(100)))
    files = segments(path)
    assert len(files) > 2 and [file.number for file in files] == list(range(1, len(files) + 1))
    assert all(file.path.stat().st_size < 300_000 for file in files)
    keys = [asked(batch * 1000 + i) for batch in range(40) for i in range(100)]
    for reader in (ledger, Ledger(path, limit_bytes=200_000)):
        assert find(reader, *keys) == [i / 100 for _ in range(40) for i in range(100)]
        assert find(reader, asked(10**9)) == [None] and reader.count() == 4000
    recorded = Archive(path).find("quality", JUDGE, set(keys))
    assert [recorded[key][0].verdict.score for key in keys] == [i / 100 for _ in range(40) for i in range(100)]


def test_replicas_have_files_of_their_own_which_an_archive_reads_together(path):
    for replica in range(2):
        add(Ledger(path, replica), (asked(replica), Verdict(float(replica))), (asked(7), Verdict(replica / 4)))
    found = Archive(path).find("quality", JUDGE, {asked(0), asked(1), asked(7)})
    assert [(r.replica, r.verdict.score) for r in found[asked(7)]] == [(0, 0.0), (1, 0.25)]
    assert [found[asked(i)][0].verdict.score for i in range(2)] == [0.0, 1.0]
    assert find(Ledger(path, 0), asked(1)) == [None]


def test_two_processes_may_write_the_same_ledger(path):
    one, two = Ledger(path, limit_bytes=100_000), Ledger(path, limit_bytes=100_000)
    for batch in range(30):
        for ledger in (one, two):
            add(ledger, *((asked(100 * batch + i), Verdict(0.5)) for i in range(100)))
    keys = [asked(i) for i in range(3000)]
    assert find(Ledger(path), *keys) == [0.5] * 3000


@pytest.mark.parametrize("mode, words", [("all", 200), ("sample", None), ("none", 0)])
def test_words_are_kept_of_all_samples_of_a_share_or_of_none_and_scores_always(path, mode, words):
    ledger = Ledger(path, raw=RawPolicy(mode, share=0.25))
    for i in range(200):
        verdict = Verdict(1.0, raw=f"because {i}")
        add(ledger, (asked(i), verdict), about=context(i, texts=(f"text {i}", "other")))
    assert find(ledger, *map(asked, range(200))) == [1.0] * 200
    frames = [decompressed(frame) for (frame,) in rows(path, "SELECT raw FROM batches WHERE raw IS NOT NULL")]
    texts = [decompressed(frame)["prefix"] for (frame,) in rows(path, "SELECT texts FROM passages")]
    policy = RawPolicy(mode, share=0.25)
    kept = [i for i in range(200) if policy.keeps(i)]
    assert frames == [[f"because {i}"] for i in kept] and texts == [f"text {i}" for i in kept]
    assert len(kept) == words if words is not None else 30 <= len(kept) <= 70


@pytest.mark.parametrize("mode, kept", [("sample", 1), ("none", 0)])
def test_the_words_of_a_failure_are_kept_unless_none_are(path, mode, kept):
    add(Ledger(path, raw=RawPolicy(mode, share=0.0)), (asked(), Verdict(math.nan, "??", "unparsable: no verdict")))
    assert len(rows(path, "SELECT raw FROM batches WHERE raw IS NOT NULL")) == kept


def test_broken_unicode_does_not_stop_the_ledger(path):
    add(Ledger(path), (asked(), Verdict(1.0, raw="broken \ud800")), about=context(texts=("\udfff", "b")))
    assert decompressed(rows(path, "SELECT raw FROM batches")[0][0]) == ["broken ?"]


def test_what_was_written_after_a_checkpoint_is_lost_but_for_its_scores(path):
    ledger = Ledger(path)
    failed = Verdict(math.nan, failure="server: HTTP 500")
    add(ledger, (asked(0), failed))
    state = ledger.state_dict()
    add(ledger, (asked(1), failed), (asked(2), Verdict(1.0)))
    resumed = Ledger(path)
    resumed.load_state_dict(state)
    add(resumed, (asked(1), Verdict(0.0)))
    found = Archive(path).find("quality", JUDGE, {asked(0), asked(1), asked(2)})
    assert [r.verdict.score for r in found[asked(1)]] == [0.0], "the failure was in a step that was done again"
    assert math.isnan(found[asked(0)][0].verdict.score) and found[asked(2)][0].verdict.score == 1.0
    other = Ledger(path.with_name("other.sqlite"))
    add(other, (asked(1), failed))
    other.load_state_dict(state)
    assert asked(1) in Archive(path.with_name("other.sqlite")).find("quality", JUDGE, {asked(1)})


def test_a_bloom_filter_never_denies_what_it_holds_and_rarely_claims_more():
    keys = [prompt(i) for i in range(20_000)]
    bloom = Bloom.load(Bloom.of(keys[:10_000]).dump())
    assert bloom.may_hold(keys[:10_000]) == set(keys[:10_000])
    assert len(bloom.may_hold(keys[10_000:])) < 200
    assert Bloom.of([]).may_hold(keys) == set()


def test_a_file_of_something_else_is_refused(path):
    file = segment_path(path, 0, 1)
    file.write_text("these are notes, and not a database at all" * 100)
    with pytest.raises(DataError, match="cannot be opened"):
        Ledger(path)
    with pytest.raises(DataError, match="cannot be read"):
        Archive(path)
    newer = path.with_name("newer.sqlite")
    with sqlite3.connect(segment_path(newer, 0, 1)) as db:
        db.execute("PRAGMA user_version=9")
    for opened in (Ledger, Archive):
        with pytest.raises(DataError, match="has format 9, not 2"):
            opened(newer)
    with pytest.raises(DataError, match="no ledger at"):
        Archive(path.with_name("nothing.sqlite"))


_WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from tests.teacher.test_ledger import Ledger, Verdict, add, asked
    ledger, start = Ledger(Path(sys.argv[1]), limit_bytes=120_000), int(sys.argv[2])
    for batch in range(start, start + 100_000):
        add(ledger, *((asked(batch, vote), Verdict(vote / 50, raw="x" * 300)) for vote in range(50)))
        print(batch, flush=True)
""")


def test_writers_killed_in_the_middle_lose_no_finished_batch_and_leave_no_half_one(path):
    moments, finished = random.Random(5), []
    for life in range(4):
        start = 1_000_000 * life
        command = [sys.executable, "-c", _WRITER, str(path), str(start)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
        assert writer.stdout is not None
        assert int(writer.stdout.readline()) == start
        # Anywhere: within a statement, a commit, a rotation.
        time.sleep(moments.uniform(0.0, 0.3))
        writer.send_signal(signal.SIGKILL)
        finished += [start, *(int(line) for line in writer.stdout if line.endswith("\n"))]
        writer.wait()
        writer.stdout.close()
    ledger = Ledger(path, limit_bytes=120_000)
    assert len(finished) > 20 and len(segments(path)) > 1
    assert ledger.count() % 50 == 0 and 50 * len(finished) <= ledger.count() <= 50 * (len(finished) + 4)
    assert None not in find(ledger, *(asked(b, vote) for b in finished for vote in range(50)))
    for file in segments(path):
        with sqlite3.connect(file.path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert db.execute("SELECT COUNT(*) FROM votes WHERE batch NOT IN (SELECT id FROM batches)").fetchone() == (
                0,
            )


def test_failures_of_steps_that_are_asked_again_never_happened_and_those_of_their_rewrites_did(path):
    """Step 4 is in the checkpoint with its rewrites and without its verdicts, step 5 not at all; step 3 is whole."""
    ledger = Ledger(path, limit_bytes=1)  # a file for each write
    failed, identity = Verdict(math.nan, failure="server: HTTP 500"), JUDGE
    for number, (criterion, step) in enumerate(
        [("quality", 3), ("rewriter", 4), ("quality", 4), ("rewriter", 5), ("quality", 3)]
    ):
        add(ledger, (asked(number), failed), criterion=criterion, about=context(step=step))
    state = ledger.state_dict()
    add(ledger, (asked(9), failed), about=context(step=4))
    ledger.close()
    resumed = Ledger(path, limit_bytes=1)
    resumed.load_state_dict({**state, "judged_again": (4,), "prepared_again": (5, 6)})
    archive = Archive(path)
    found = {c: archive.find(c, identity, [asked(n) for n in range(10)]) for c in ("quality", "rewriter")}
    assert set(found["quality"]) == {asked(0), asked(4)} and set(found["rewriter"]) == {asked(1)}


def test_a_full_disk_and_a_damaged_file_are_named_with_the_remedy_and_lose_nothing_that_was_kept(path):
    ledger = Ledger(path)
    add(ledger, (asked(0), Verdict(1.0)))
    (file,) = segments(path)
    ledger._active._db.execute("PRAGMA max_page_count = 1")  # SQLite's own "database or disk is full"
    big = context(texts=("a", os.urandom(60_000).hex()))
    with pytest.raises(DataError, match=r"ledger.r000.00001.sqlite cannot be written \(.*full\): give it room"):
        add(ledger, (asked(1), Verdict(1.0)), about=big)
    assert find(ledger, asked(0), asked(1)) == [1.0, None]
    ledger._active._db.execute("PRAGMA max_page_count = 1000000")
    add(ledger, (asked(1), Verdict(0.0)), about=big)
    ledger.close()
    assert find(Ledger(path), asked(0), asked(1)) == [1.0, 0.0]
    data = bytearray(file.path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    file.path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be \w+ \(.*malformed.*\): "):
        find(Ledger(path), asked(0))
