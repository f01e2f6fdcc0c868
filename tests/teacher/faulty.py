"""Teachers that fail in chosen ways, built inside the teacher process by their dotted name."""

import asyncio
import os
import signal
import sys

import numpy as np

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.interfaces import GroupVerdict, JudgeResult, Rewrite, RewriteResult


class Scripted:
    """Does what the prefix text of the first group says; counts judged requests as its running statistics."""

    learns = True

    def __init__(self):
        self.seen = 0

    async def judge(self, request):
        order = request.groups[0].prefix.text
        if order == "raise":
            raise ZeroDivisionError("a defect of the judge")
        if order == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "exit":
            os._exit(7)
        if order.startswith("sleep "):
            await asyncio.sleep(float(order.split()[1]))
        self.seen += 1
        scores = np.array([float(order == "torch?" and "torch" in sys.modules), np.nan])
        return JudgeResult((GroupVerdict(scores, {"quality": scores}, 3, 1, 2, 0.5),), latencies_s=np.array([0.1, 0.3]))

    async def rewrite(self, request):
        return RewriteResult(tuple(Rewrite(item.suffix.text.upper()) for item in request.items))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

    async def aclose(self):
        pass


def scripted(config):
    return Scripted()


def misconfigured(config):
    raise ConfigurationError("judge-model is 'x': fit one")


def defective(config):
    raise KeyError("no such thing")


def stuck(config):
    while True:
        signal.pause()
