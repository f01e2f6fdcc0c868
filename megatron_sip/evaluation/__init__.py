"""Held-out comparison of two policies: who a judge prefers, and whether either has degenerated."""

from megatron_sip.evaluation.compare import Evaluation, evaluate, generate_all, render_table
from megatron_sip.evaluation.config import EvaluationConfig
from megatron_sip.evaluation.guards import Guards, measure_guards
from megatron_sip.evaluation.paired import Decoding, PairedVerdicts, continue_prefixes, judge_pairs
from megatron_sip.evaluation.win_rate import WinRate, coherence_outcomes, outcomes, win_rate

__all__ = [
    "Decoding",
    "Evaluation",
    "EvaluationConfig",
    "Guards",
    "PairedVerdicts",
    "WinRate",
    "coherence_outcomes",
    "continue_prefixes",
    "evaluate",
    "generate_all",
    "judge_pairs",
    "measure_guards",
    "outcomes",
    "render_table",
    "win_rate",
]
