"""Puts the page together: tiles, charts, alarms, candidates, configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.files import require_folder_of, write_text
from megatron_sip.observability.metrics import CONSUMED_SAMPLES, METRICS_FILE
from megatron_sip.observability.progress import format_duration
from megatron_sip.observability.report.charts import chart_figures
from megatron_sip.observability.report.series import RunRecord, Series, mean_of_tenth
from megatron_sip.observability.report.style import SCRIPT, STYLE
from megatron_sip.observability.report.svg import format_number

REPORT_FILE = "report.html"
MAX_SAMPLES = 60
_KIND_CLASSES = {"suffix": "c0", "rewrite": "c1", "rollout": "c2"}


def write_report(run_dir: Path, output: Path | None = None, title: str = "") -> Path:
    """Write the report of the run in ``run_dir`` and return its path, ``run_dir/report.html`` unless given.

    The file appears whole, or an earlier one stays. Raises DataError if the folder has no metrics (then it is not a
    run's folder, or no step was finished), and if the report cannot be written.
    """
    if output is not None:
        require_folder_of(output, "-o")
    record = RunRecord.read(run_dir)
    if not record.metrics:
        raise DataError(f"{run_dir / METRICS_FILE} has no steps: give the --run-dir of a run that finished a step")
    path = output or run_dir / REPORT_FILE
    write_text(path, render_page(record, title or run_dir.resolve().name), errors="replace")
    return path


def render_page(record: RunRecord, title: str) -> str:
    """The whole page. Every text that comes from the run is escaped."""
    series = record.series()
    chance = record.info.get("chance") or {}
    figures, others = chart_figures(series, record.phases(), record.last_step, alarm_limits(record.info), chance)
    sections = [
        f'<section class="tiles">{"".join(_tiles(record, series))}</section>',
        f'<h2 id="curves">Curves</h2><section class="charts">{"".join(figures)}</section>',
        _alarms(record),
        _samples(record.samples),
        '<h2 id="run">Run</h2>',
        _run_info(record.info),
        _others(others),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · Self-Improving Pretraining</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{_subtitle(record)}"
        '<nav><a href="#curves">Curves</a><a href="#alarms">Alarms</a><a href="#candidates">Candidates</a>'
        '<a href="#run">Run</a></nav>'
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def alarm_limits(info: Mapping[str, Any]) -> dict[str, object]:
    """Values of the ``alarm_*`` options, wherever they stand in the nested configuration."""
    found: dict[str, object] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                if str(key).startswith("alarm_"):
                    found[str(key)] = value
                visit(value)

    visit(info.get("config"))
    return found


def _subtitle(record: RunRecord) -> str:
    facts = {**record.info.get("facts", {}), **record.info.get("versions", {})}
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in facts.items()}
    text = " · ".join(f"{name} {value}" for name, value in shown.items())
    return f'<p class="sub">{escape(text)}</p>'


def _tiles(record: RunRecord, series: Mapping[str, Series]) -> list[str]:
    tiles = [_tile("Steps", f"{record.last_step:,}", _consumed(series))]
    if (loss := series.get("lm loss")) is not None:
        tiles.append(_tile("lm loss", f"{mean_of_tenth(loss, True):.3f}", "mean of the last tenth"))
    if (loss := series.get("lm loss validation")) is not None:
        low = float(loss.values.min())
        tiles.append(_tile("Validation loss", f"{loss.last:.3f}", f"first {loss.values[0]:.3f}, lowest {low:.3f}"))
    if (rate := series.get("sip/chosen_rate/rollout")) is not None:
        first, last = mean_of_tenth(rate, False), mean_of_tenth(rate, True)
        chance = record.info.get("chance", {}).get("rollout")
        by_chance = f"; by chance {chance:.0%}" if chance else ""
        tiles.append(_tile("Rollout chosen", f"{last:.1%}", f"last tenth; {first:.1%} in the first{by_chance}"))
    if (speed := series.get("tokens_per_s")) is not None:
        tiles.append(_tile("Tokens per second", format_number(float(np.median(speed.values))), "median step"))
    if (seconds := series.get("iteration-time")) is not None:
        total = format_duration(float(seconds.values.sum()))
        tiles.append(_tile("Time in steps", total, f"median {np.median(seconds.values):.2f} s"))
    if (skipped := series.get("skipped")) is not None:
        count = int(skipped.values.sum())
        tiles.append(_tile("Steps skipped", str(count), "NaN or Inf gradients", alert=count > 0))
    alarms = len(record.alarms())
    tiles.append(_tile("Alarms", str(alarms), "see below" if alarms else "none was raised", alert=alarms > 0))
    return tiles


def _tile(label: str, value: str, note: str, alert: bool = False) -> str:
    style = "tile alert" if alert else "tile"
    return f'<div class="{style}"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'


def _consumed(series: Mapping[str, Series]) -> str:
    parts = [
        f"{int(series[name].last):,} {unit}"
        for name, unit in ((CONSUMED_SAMPLES, "samples"), ("tokens", "tokens"))
        if name in series
    ]
    return ", ".join(parts)


def _alarms(record: RunRecord) -> str:
    alarms = record.alarms()
    if not alarms:
        return '<h2 id="alarms">Alarms</h2><p class="empty">No alarm was raised.</p>'
    rows = "".join(f'<tr><td class="num">{step}</td><td>{escape(text)}</td></tr>' for step, text in alarms)
    table = f'<table><tr><th class="num" style="width:80px">step</th><th>alarm</th></tr>{rows}</table>'
    summary = f"<summary>{len(alarms)} raised</summary>"
    return f'<h2 id="alarms">Alarms</h2><details class="card" open>{summary}{table}</details>'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    head = '<h2 id="candidates">Prefixes, candidates and what was chosen</h2>'
    if not samples:
        return head + '<p class="empty">No judged sample was recorded.</p>'
    shown = samples
    if len(samples) > MAX_SAMPLES:
        picks = np.linspace(0, len(samples) - 1, MAX_SAMPLES).round().astype(int)
        shown = [samples[index] for index in picks]
    note = f"{len(shown)} of {len(samples)} recorded samples, evenly over the run, the latest first."
    options = "".join(f'<option value="{kind}">{kind} chosen</option>' for kind in _KIND_CLASSES)
    filters = (
        f'<div class="filters" hidden><select aria-label="chosen"><option value="">all</option>{options}'
        '<option value="none">nothing chosen</option></select><input type="search" placeholder="Search in the texts" '
        'aria-label="search"></div>'
    )
    return f'{head}<p class="sub">{note}</p>{filters}{"".join(_sample(sample) for sample in reversed(shown))}'


def _sample(sample: Mapping[str, Any]) -> str:
    candidates = sample.get("candidates") or []
    criteria = sorted({name for candidate in candidates for name in candidate.get("criteria") or {}})
    chosen = next((str(c.get("kind")) for c in candidates if c.get("chosen")), "none")
    reason = f" · teaches nothing: {sample['reason']}" if sample.get("reason") else ""
    header = f"step {sample['step']} · sample {sample.get('sample_id')} · document {sample.get('document')}{reason}"
    columns = "".join(f'<th class="num">{escape(name)}</th>' for name in criteria)
    rows = "".join(_candidate(candidate, criteria) for candidate in candidates)
    return (
        f'<article class="card sample" data-chosen="{escape(chosen)}"><header>{escape(header)}</header>'
        f'<div class="text prefix">{_text(str(sample.get("prefix", "")))}</div>'
        f'<table><tr><th style="width:92px">candidate</th><th>continuation</th>{columns}<th class="num">score</th>'
        f'<th style="width:76px"></th></tr>{rows}</table></article>'
    )


def _candidate(candidate: Mapping[str, Any], criteria: Sequence[str]) -> str:
    kind = str(candidate.get("kind"))
    name = f"rollout {candidate.get('rollout')}" if kind == "rollout" else kind
    flag, style = "", ""
    if candidate.get("chosen"):
        flag, style = "✓ chosen", "chosen"
    elif candidate.get("rejected"):
        flag, style = "✗ rejected", "rejected"
    scores = [(candidate.get("criteria") or {}).get(criterion) for criterion in criteria]
    cells = "".join(f'<td class="num">{_score(score)}</td>' for score in [*scores, candidate.get("score")])
    return (
        f'<tr class="{style}"><td class="kind {_KIND_CLASSES.get(kind, "c7")}">{escape(name)}</td>'
        f'<td class="text">{_text(str(candidate.get("text", "")))}</td>{cells}<td class="flag">{flag}</td></tr>'
    )


def _score(value: Any) -> str:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.3f}" if is_number else '<span class="empty">missing</span>'


_VISIBLE_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}


def _text(text: str) -> str:
    """Escaped, with control characters made visible: a young policy writes them."""
    return escape(text.translate(_VISIBLE_CONTROLS))


def _run_info(info: Mapping[str, Any]) -> str:
    if not info:
        return '<p class="empty">The run left no run.json.</p>'
    text = json.dumps(info.get("config", {}), indent=2, ensure_ascii=False)
    return f'<details class="card"><summary>Configuration</summary><pre>{escape(text)}</pre></details>'


def _others(figures: Sequence[str]) -> str:
    if not figures:
        return ""
    return (
        f'<details class="card"><summary>Other scalars ({len(figures)})</summary>'
        f'<div class="charts small">{"".join(figures)}</div></details>'
    )
