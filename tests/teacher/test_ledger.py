"""Covers the ledger as record and as cache: votes, failures, foreign files, and a writer killed in the middle."""

import math
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from megatron_sip.errors import DataError
from megatron_sip.teacher.interfaces import JudgeIdentity, Verdict
from megatron_sip.teacher.ledger import Ledger, LedgerEntry, LedgerKey

JUDGE = JudgeIdentity("judge", "model", "T=1")


def key(prompt="p", vote=0, criterion="quality", identity=JUDGE):
    return LedgerKey(criterion, identity, prompt, vote)


def entry(entry_key, verdict):
    return LedgerEntry(entry_key, verdict, sample_id=1, options=(0, 1))


def test_a_hundred_votes_on_one_question_are_a_hundred_verdicts(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    keys = [key(vote=v) for v in range(100)]
    ledger.add([entry(k, Verdict(float(v % 2), raw=str(v))) for v, k in enumerate(keys)])
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert again.count() == 100
    assert [(v.score, v.raw) for v in again.find(keys)] == [(v % 2, str(v)) for v in range(100)]


def test_a_verdict_is_found_only_under_everything_that_made_it(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add([entry(key(), Verdict(1.0))])
    others = [
        key(prompt="q"),
        key(vote=1),
        key(criterion="safety"),
        key(identity=JudgeIdentity("other", "model", "T=1")),
        key(identity=JudgeIdentity("judge", "newer", "T=1")),
        key(identity=JudgeIdentity("judge", "model", "T=0")),
    ]
    assert ledger.find([*others, key()]) == [None] * 6 + [Verdict(1.0)]


def test_a_failure_is_recorded_but_asked_again(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add([entry(key(), Verdict(math.nan, raw="garbage", failure="unparsable"))])
    assert ledger.find([key()]) == [None]
    assert ledger.count() == 1
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT score, raw, failure FROM verdicts").fetchall() == [(None, "garbage", "unparsable")]
    ledger.add([entry(key(), Verdict(0.0))])
    assert ledger.find([key()]) == [Verdict(0.0)]
    assert ledger.count() == 1


def test_many_keys_are_looked_up_in_one_call(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add([entry(key(prompt=str(i)), Verdict(1.0)) for i in range(0, 3000, 2)])
    found = ledger.find([key(prompt=str(i)) for i in range(3000)])
    assert [verdict is not None for verdict in found] == [i % 2 == 0 for i in range(3000)]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_text("these are notes, and not a database at all" * 100)
    with pytest.raises(DataError, match="cannot be opened"):
        Ledger(path)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version=9")
    with pytest.raises(DataError, match="has format 9"):
        Ledger(newer)


def test_kill_in_the_middle_of_writes_loses_no_finished_batch_and_leaves_no_half_one(tmp_path):
    path = tmp_path / "ledger.sqlite"
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from tests.teacher.test_ledger import Ledger, Verdict, entry, key
        ledger, batch = Ledger(Path(sys.argv[1])), 0
        while True:
            ledger.add([entry(key(prompt=f"{batch}"), Verdict(1.0, raw="x" * 2000))] +
                       [entry(key(prompt=f"{batch}", vote=v), Verdict(0.0)) for v in range(1, 50)])
            print(batch, flush=True)
            batch += 1
    """)
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 20:
            writer.send_signal(signal.SIGKILL)
            break
    finished = max([20, *(int(line) for line in writer.stdout if line.strip())])
    writer.wait()
    writer.stdout.close()
    ledger = Ledger(path)
    assert ledger.count() % 50 == 0
    assert ledger.count() >= 50 * (finished + 1)
    assert None not in ledger.find([key(prompt=str(b), vote=v) for b in range(finished + 1) for v in range(50)])
