"""Held-out comparison of two policies: who a judge prefers, and whether either has degenerated."""

from typing import TYPE_CHECKING

from megatron_sip.evaluation.config import EvaluationConfig
from megatron_sip.evaluation.paired import Decoding, PairedVerdicts, continue_prefixes, judge_pairs
from megatron_sip.evaluation.win_rate import WinRate, coherence_outcomes, outcomes, win_rate
from megatron_sip.lazy import imported_when_asked_for

if TYPE_CHECKING:
    from megatron_sip.evaluation.compare import Evaluation, evaluate, generate_all, render_table
    from megatron_sip.evaluation.guards import Guards, measure_guards
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        compare="Evaluation evaluate generate_all render_table",
        guards="Guards measure_guards",
    )

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
