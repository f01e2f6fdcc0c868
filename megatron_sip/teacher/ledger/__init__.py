"""Every verdict that was given, in SQLite files: a cache, a source for replay, a record that people read.

``files`` names them, ``segment`` is one of them, ``store`` writes a replica's, ``archive`` reads those of a whole run,
``reading`` and ``export`` are for people.
"""

from megatron_sip.teacher.ledger.archive import Archive, Recorded
from megatron_sip.teacher.ledger.records import Asked, Context, RawPolicy, prompt_key
from megatron_sip.teacher.ledger.store import REWRITER, Ledger

__all__ = ["REWRITER", "Archive", "Asked", "Context", "Ledger", "RawPolicy", "Recorded", "prompt_key"]
