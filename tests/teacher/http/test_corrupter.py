"""The corrupter that asks a server."""

import asyncio

from megatron_sip.teacher.build import build_corrupter
from megatron_sip.teacher.interfaces import RewriteItem
from tests.teacher.http.server import FaultServer
from tests.teacher.http.test_judges import config, content, passage


def test_the_corrupter_takes_what_follows_the_marker_and_gives_reasons_for_nothing():
    def corrupt(server):
        async def run():
            made, remote = build_corrupter(config(server, judge_max_attempts=2), (), 0.4, 0)
            found = await made.corrupt([RewriteItem(0, passage("It rained"), passage(" all day."))])
            await remote.aclose()
            return found[0]

        return asyncio.run(run())

    good = "Plan: another time.\nCORRUPTED CONTINUATION:\nall year.\n"
    with FaultServer(answer=lambda body, index: good) as server:
        found = corrupt(server)
        assert "<original>\n all day.\n</original>" in content(server.seen[0].body)
    assert (found.text, found.kind, found.failure) == (" all year.", "model", "")
    cases = {
        "say no marker": "unparsable",
        "say CORRUPTED CONTINUATION: all  day.": "unparsable",
        "length": "unparsable",
        "refusal": "refused",
        "status 500": "server",
    }
    for fault, failure in cases.items():
        with FaultServer(fault=lambda number, fault=fault: fault, answer=lambda body, index: good) as server:
            found = corrupt(server)
        assert (found.text, found.failure.partition(":")[0]) == (None, failure), fault
