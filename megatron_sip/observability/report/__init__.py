"""The HTML report of a run: one file that needs no network, from metrics.jsonl, samples.jsonl and run.json."""

from megatron_sip.observability.report.page import write_report

__all__ = ["write_report"]
