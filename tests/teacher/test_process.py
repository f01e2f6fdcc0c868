"""Covers the teacher process: tickets, every way to fail, its end with its parent. Each test starts a real process."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError, JudgeError
from megatron_sip.teacher import JudgeRequest, RewriteRequest, TeacherConfig, TeacherProcess
from megatron_sip.teacher.interfaces import JudgeGroup, Passage, RewriteItem
from tests.teacher.http.server import FaultServer
from tests.teacher.http.test_judges import group

EMPTY = np.zeros(0, dtype=np.int64)


def start(factory="scripted", **options):
    return TeacherProcess(TeacherConfig(**options), factory=f"tests.teacher.faulty:{factory}")


def request(order="fine"):
    passage = Passage(EMPTY, "")
    return JudgeRequest((JudgeGroup(0, Passage(EMPTY, order), passage, (passage, passage), ("suffix", "rollout")),))


def wait_until_gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_answers_come_in_any_order_and_once_each():
    with start() as teacher:
        teacher.submit("slow", request("sleep 0.5"))
        teacher.submit(2, request("torch?"))
        teacher.submit(("a", "rewrite"), RewriteRequest((RewriteItem(0, Passage(EMPTY, ""), Passage(EMPTY, "text")),)))
        result = teacher.collect(2)
        assert not teacher.ready("slow")
        assert result.groups[0].scores[0] == 0, "the teacher process must not import torch"
        assert np.isnan(result.groups[0].scores[1])
        assert teacher.collect(("a", "rewrite")).rewrites[0].text == "TEXT"
        slow = teacher.collect("slow")
        assert (slow.groups[0].num_calls, slow.groups[0].num_failures, slow.groups[0].num_comparisons) == (3, 1, 2)
        assert np.percentile(slow.latencies_s, 50) == pytest.approx(0.2)
        with pytest.raises(ValueError, match="collected already"):
            teacher.collect("slow")


def test_an_exception_reaches_its_own_ticket_with_its_traceback_and_no_other():
    with start() as teacher:
        teacher.submit(0, request("raise"))
        teacher.submit(1, request())
        with pytest.raises(JudgeError) as error:
            teacher.collect(0)
        assert "ZeroDivisionError: a defect of the judge" in str(error.value)
        assert "faulty.py" in str(error.value)
        assert teacher.collect(1).groups[0].num_calls == 3


@pytest.mark.parametrize(("how", "words"), [("kill", "killed by SIGKILL"), ("exit", "ended with status 7")])
def test_a_process_that_dies_fails_every_open_ticket_and_later_calls_but_keeps_answers(how, words):
    with start() as teacher:
        teacher.submit("before", request())
        while not teacher.ready("before"):
            time.sleep(0.01)
        teacher.submit("open", request("sleep 60"))
        teacher.submit("fatal", request(how))
        for ticket in ("fatal", "open"):
            with pytest.raises(JudgeError, match=words):
                teacher.collect(ticket)
        assert teacher.collect("before").groups[0].num_calls == 3
        with pytest.raises(JudgeError, match=words):
            teacher.submit("later", request())


def test_a_late_answer_times_out_and_can_still_be_collected():
    with start() as teacher:
        teacher.submit(0, request("sleep 0.6"))
        with pytest.raises(JudgeError, match=r"no answer after 0\.1 s"):
            teacher.collect(0, timeout_s=0.1)
        assert teacher.collect(0).groups[0].num_calls == 3


def test_a_full_queue_makes_submit_wait_and_then_complain():
    with start(judge_queue=2, judge_timeout_s=0.4) as teacher:
        teacher.submit(0, request("sleep 0.2"))
        teacher.submit(1, request("sleep 60"))
        begin = time.monotonic()
        teacher.submit(2, request("sleep 60"))
        assert time.monotonic() - begin > 0.1, "had to wait for ticket 0"
        with pytest.raises(JudgeError, match="held 2 unanswered batches"):
            teacher.submit(3, request())


def test_state_is_that_after_all_submitted_requests():
    with start() as teacher:
        teacher.submit(0, request("sleep 0.2"))
        teacher.submit(1, request())
        assert teacher.state_dict() == {"seen": 2}
        teacher.load_state_dict({"seen": 40})
        teacher.submit(2, request())
        assert teacher.state_dict() == {"seen": 41}


def test_a_ticket_cannot_be_used_twice_at_a_time():
    with start() as teacher:
        teacher.submit(0, request("sleep 0.1"))
        with pytest.raises(ValueError, match="already out"):
            teacher.submit(0, request())


def test_a_users_mistake_keeps_its_kind_and_a_defect_its_traceback():
    with pytest.raises(ConfigurationError, match="judge-model is 'x': fit one"):
        start("misconfigured")
    with pytest.raises(JudgeError, match=r"(?s)KeyError: 'no such thing'.*defective"):
        start("defective")


def test_a_process_that_never_gets_ready_is_given_up_and_ended():
    before = time.monotonic()
    with pytest.raises(JudgeError, match="not ready after 1 s"):
        TeacherProcess(TeacherConfig(), factory="tests.teacher.faulty:stuck", start_timeout_s=1.0)
    assert time.monotonic() - before < 30


def test_signals_to_the_job_leave_the_teacher_to_its_trainer():
    with start() as teacher:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(teacher.pid, number)
        teacher.submit(0, request())
        assert teacher.collect(0).groups[0].num_calls == 3
        pid = teacher.pid
    assert wait_until_gone(pid)


def test_the_process_dies_with_a_parent_that_is_killed_also_while_another_child_holds_its_socket():
    program = textwrap.dedent("""
        import os, time
        from tests.teacher.test_process import start
        if __name__ == "__main__":
            teacher = start()
            bystander = os.fork()
            if bystander == 0:
                time.sleep(60)
                os._exit(0)
            print(teacher.pid, bystander, flush=True)
            time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    teacher, bystander = map(int, parent.stdout.readline().split())
    parent.kill()
    parent.wait()
    gone = wait_until_gone(teacher)
    os.kill(bystander, signal.SIGKILL)
    parent.stdout.close()
    assert gone


def test_the_state_of_a_ledger_does_not_wait_for_a_judge_that_does_not_answer(tmp_path):
    """Else a checkpoint in an outage would wait for it, until it is lost."""
    with FaultServer(fault=lambda number: "hang") as server:
        config = TeacherConfig(
            teacher="http",
            judge_endpoints=(server.url,),
            judge_served_model="m",
            judge_ledger=str(tmp_path / "ledger.sqlite"),
        )
        with TeacherProcess(config) as teacher:
            started = time.perf_counter()
            teacher.submit(1, JudgeRequest((group("1", "2"),)))
            assert teacher.state_dict()["verdicts"]["batch"] == 0
            assert time.perf_counter() - started < 5.0 and not teacher.ready(1)
