"""The teacher process: ``python -m megatron_sip.teacher.worker FD PARENT_PID``. Requests in, answers out, concurrently.

It dies with its parent: the socket then ends, and should another child of the parent hold the socket open, the parent's
process number changes. SIGINT and SIGTERM are left to the parent, which may still need verdicts to finish its step.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Hashable
from multiprocessing.connection import Connection
from typing import Any

from megatron_sip.teacher.interfaces import JudgeRequest, RewriteRequest, Teacher
from megatron_sip.teacher.messages import Answer, Close, Failure, GetState, Ready, SetState, Start, Submit

_PARENT_CHECK_S = 1.0


def main(fd: int, parent: int) -> int:
    """Serve until told to close. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A thread: it must see the parent end also while a judge keeps the event loop busy.
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    connection = Connection(fd)
    try:
        start = connection.recv()
        teacher = _build(start)
        connection.send(Ready())
        asyncio.run(_serve(connection, teacher))
    except (EOFError, ConnectionError):
        return 0
    except Exception as error:
        # The parent raises it: nothing is swallowed here.
        connection.send(_failure(None, error))
        return 1
    return 0


def _build(start: Start) -> Teacher:
    module, _, function = start.factory.partition(":")
    teacher: Teacher = getattr(importlib.import_module(module), function)(start.config, **start.options)
    return teacher


def _failure(ticket: Hashable | None, error: BaseException) -> Failure:
    text = "".join(traceback.format_exception(error))
    return Failure(ticket, type(error).__name__, str(error), text)


async def _serve(connection: Connection, teacher: Teacher) -> None:
    loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Any]()
    reader = threading.Thread(target=_read, args=(connection, loop, inbox), daemon=True)
    reader.start()
    tasks: set[asyncio.Task[None]] = set()
    while True:
        message = await inbox.get()
        if isinstance(message, Submit):
            task = asyncio.create_task(_handle(connection, teacher, message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        elif isinstance(message, GetState | SetState):
            # The state after all that was submitted before, so that it does not depend on timing. Without running
            # statistics there is nothing to wait for: a checkpoint does not wait for a slow judge, or one that is gone.
            if teacher.learns:
                await asyncio.gather(*tasks)
            _handle_state(connection, teacher, message)
        elif isinstance(message, Exception):
            raise message
        else:
            break
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await teacher.aclose()


def _read(connection: Connection, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any]) -> None:
    while True:
        try:
            message: Any = connection.recv()
        except (EOFError, ConnectionError):
            message = Close()
        except Exception as error:
            # A message that cannot be unpickled: raised in the loop, which reports it to the parent.
            message = error
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, message)
        except RuntimeError:
            return  # the loop has ended: nobody is left to tell
        if isinstance(message, Close | Exception):
            return


def _end_with_parent(parent: int) -> None:
    """``parent`` is told by the parent itself: asking here could come too late."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(0)


async def _handle(connection: Connection, teacher: Teacher, message: Submit) -> None:
    try:
        if isinstance(message.request, JudgeRequest):
            answer: Any = Answer(message.ticket, await teacher.judge(message.request))
        else:
            assert isinstance(message.request, RewriteRequest), type(message.request)
            answer = Answer(message.ticket, await teacher.rewrite(message.request))
    except Exception as error:
        # Reaches whoever collects the ticket, as JudgeError with this traceback.
        answer = _failure(message.ticket, error)
    connection.send(answer)


def _handle_state(connection: Connection, teacher: Teacher, message: GetState | SetState) -> None:
    try:
        if isinstance(message, SetState):
            teacher.load_state_dict(message.state)
            connection.send(Answer(message.ticket, None))
        else:
            connection.send(Answer(message.ticket, teacher.state_dict()))
    except (KeyError, TypeError, ValueError) as error:
        connection.send(_failure(message.ticket, error))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
