"""Held-out comparison of two policies: who a judge prefers, and whether either has degenerated."""

from megatron_sip.evaluation.guards import Guards, measure_guards
from megatron_sip.evaluation.paired import Decoding, PairedVerdicts, continue_prefixes, judge_pairs
from megatron_sip.evaluation.win_rate import WinRate, coherence_outcomes, outcomes, win_rate

__all__ = [
    "Decoding",
    "Guards",
    "PairedVerdicts",
    "WinRate",
    "coherence_outcomes",
    "continue_prefixes",
    "judge_pairs",
    "measure_guards",
    "outcomes",
    "win_rate",
]
