"""Which scalars stand together in which chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape

import numpy as np

from megatron_sip.observability.metrics import CONSUMED_SAMPLES
from megatron_sip.observability.report.series import Phase, Series, filled, running_median, smooth, thin, without_steps
from megatron_sip.observability.report.svg import (
    LEFT,
    MAX_POINTS,
    RIGHT,
    Chart,
    Line,
    format_number,
    render,
    value_range,
)

NUM_COLORS = 8
_KIND_COLORS = {"suffix": 0, "rewrite": 1, "rollout": 2}


@dataclass(frozen=True)
class ChartSpec:
    """A chart of all scalars whose names match one of ``patterns``, in the order of the patterns."""

    title: str
    patterns: tuple[str, ...]
    note: str = ""
    y_range: tuple[float, float] | None = None
    percent: bool = False
    smooth: bool = True
    stacked: bool = False
    wide: bool = False
    cut_start: bool = False
    """Let the first tenth of the steps leave the frame at the top, so that the rest is not flat."""
    with_chance: bool = False
    """Draw dashed lines at the rates that a blind choice among the candidates would give."""
    without_constants: bool = False
    """Leave curves that do not move to the other scalars."""
    alarm_limits: tuple[tuple[str, str, str], ...] = ()
    """(label, option of the alarms whose value is drawn as a dashed line, the scalar that it limits)."""


CHARTS = (
    ChartSpec(
        "Which candidate is chosen",
        ("sip/chosen_rate/*",),
        "Share of the judged prefixes whose best candidate is the suffix, the rewrite or a rollout (Figure 8 of the "
        "paper); ties are left out. Dashed: what a blind choice among all candidates would give.",
        y_range=(0.0, 1.0),
        percent=True,
        wide=True,
        with_chance=True,
    ),
    ChartSpec(
        "Rewards on held-out examples",
        ("validation/reward/*",),
        "Of the judge by task, of the rewriter on safe and unsafe suffixes (Figures 5 and 6 of the paper).",
        y_range=(0.0, 1.0),
        percent=True,
        smooth=False,
    ),
    ChartSpec(
        "Rewrites of held-out suffixes",
        ("validation/exact_match/*", "validation/token_overlap/*"),
        "Share that is the suffix, and share of its tokens that the rewrite has too (Figure 7).",
        y_range=(0.0, 1.0),
        percent=True,
        smooth=False,
    ),
    ChartSpec(
        "Verdicts on held-out examples",
        ("validation/no_verdict/*", "validation/first_option_share", "validation/no_reward/*", "validation/judge_*"),
        "Of the judge: answers without one, and share for the first option; of the rewriter: what its judges say.",
        y_range=(0.0, 1.0),
        percent=True,
        smooth=False,
    ),
    ChartSpec("Rewards of rollouts", ("reward/*",), "In training.", y_range=(0.0, 1.0), percent=True),
    ChartSpec(
        "Loss",
        ("lm loss", "lm loss validation"),
        "Next-token loss in nats per token; the start is cut off.",
        wide=True,
        cut_start=True,
    ),
    ChartSpec(
        "Losses of the objectives",
        ("* loss", "loss/*", "loss"),
        "As each objective defines it. GRPO's is near 0 whatever is learned; its rewards tell.",
    ),
    ChartSpec(
        "Chosen on held-out prefixes",
        ("probe/chosen_rate/*",),
        "The probe that may trigger the rollout phase; dashed: a blind choice.",
        y_range=(0.0, 1.0),
        percent=True,
        with_chance=True,
    ),
    ChartSpec("Judge's score by candidate", ("sip/score/*",), "Mean weighted total over the judged groups."),
    ChartSpec(
        "Judge's criteria",
        ("sip/reward/*_mean", "sip/reward/*"),
        "Mean and spread over all candidates. What is judged in pairs is left out if every group gets the same sum.",
        without_constants=True,
    ),
    ChartSpec(
        "Which candidate is rejected",
        ("sip/rejected_rate/*",),
        "Dashed: a blind choice.",
        y_range=(0.0, 1.0),
        percent=True,
        with_chance=True,
    ),
    ChartSpec(
        "DPO rewards",
        ("rewards/margins", "rewards/chosen", "rewards/rejected"),
        "β times the log-ratio to the reference, nats.",
    ),
    ChartSpec(
        "DPO accuracy",
        ("rewards/accuracies",),
        "Pairs with a positive margin. Steps right after a sync of the reference are left out: the policy is the "
        "reference then, and every margin exactly 0.",
        (0.0, 1.0),
        percent=True,
    ),
    ChartSpec("Log-probs of chosen and rejected", ("logps/*",), "Sum over a continuation, nats."),
    ChartSpec(
        "Guards of the rollouts",
        (
            "rollout/distinct_2",
            "rollout/repetition",
            "rollout/max_token_share",
            "rollout/shared_trigrams",
        ),
        "Signs of a policy that hacks its judge; dashed: limits of the alarms.",
        percent=True,
        alarm_limits=(
            ("distinct-2 at least", "alarm_min_distinct_2", "rollout/distinct_2"),
            ("one token at most", "alarm_max_token_share", "rollout/max_token_share"),
            ("repetition at most", "alarm_max_repetition", "rollout/repetition"),
            ("shared at most", "alarm_max_shared_trigrams", "rollout/shared_trigrams"),
        ),
    ),
    ChartSpec("Entropy and distance to the reference", ("policy/entropy", "policy/kl*"), "Nats per token."),
    ChartSpec("Length of the rollouts", ("rollout/length",), "Tokens."),
    ChartSpec("Throughput", ("tokens_per_s", "rollout/tokens_per_s"), "Tokens per second, all ranks.", smooth=False),
    ChartSpec("Device use", ("mfu",), "Model FLOP/s over the peak.", percent=True),
    ChartSpec(
        "Where a step's time goes",
        ("timing/train_s", "timing/rollout_s", "timing/reference_s", "timing/*_s"),
        "Seconds per step, the median over a twentieth of the steps; what only some steps do, such as evaluation, is "
        "spread over all.",
        stacked=True,
    ),
    ChartSpec("Learning rate", ("learning-rate",), smooth=False),
    ChartSpec("Gradient norm", ("grad-norm",), "Before clipping.", smooth=False),
    ChartSpec("Curriculum", ("curriculum/*",), "Weights and sample counts of the streams.", smooth=False),
    ChartSpec("Pairs that teach nothing", ("sip/pairs_skipped*", "sip/ties", "sip/missing"), "Ties, missing verdicts."),
    ChartSpec("Judge: waiting and latency", ("judge/*_s",), "Seconds."),
    ChartSpec("Judge: time hidden behind training", ("judge/hidden_fraction",), y_range=(0.0, 1.0), percent=True),
    ChartSpec("Judge: failures and flips", ("judge/*_rate",), y_range=(0.0, 1.0), percent=True),
    ChartSpec("Judge: calls", ("judge/calls", "judge/comparisons_per_prompt"), "Per step."),
    ChartSpec("Prepared ahead", ("lookahead/*", "judge/open_batches", "fill/windows"), "Steps, batches, windows."),
    ChartSpec("Rewriter", ("rewriter/*",), y_range=(0.0, 1.0), percent=True),
    ChartSpec("Staleness", ("policy/staleness_*",), "Steps, and weight versions, between sampling and training."),
    ChartSpec(
        "Groups that teach nothing", ("grpo/skipped_*", "grpo/rewards_missing"), "All rewards equal, or missing."
    ),
    ChartSpec("Probability ratio", ("grpo/clipped", "grpo/kl_old", "grpo/kl_reference"), "Clipped share; KL in nats."),
    ChartSpec("Memory", ("mem-*",), "Bytes."),
)
_NOT_SHOWN = {CONSUMED_SAMPLES, "tokens", "skipped", "curriculum/phase"}
"""Shown as tiles or as bands behind the curves."""


def chart_figures(
    series: Mapping[str, Series],
    phases: Sequence[Phase],
    last_step: int,
    limits: Mapping[str, object],
    chance: Mapping[str, float],
) -> tuple[list[str], list[str]]:
    """HTML of the charts that have data, and of one small chart for each scalar that none of them shows.

    ``limits``: values of the alarms' options. ``chance``: kind of candidate -> its rate if the choice were blind.
    """
    left = {name: values for name, values in _with_margins(series).items() if name not in _NOT_SHOWN}
    figures, zeros = [], dict[str, Series]()
    for spec in CHARTS:
        names = _matching(spec.patterns, left)
        if spec.without_constants:
            names = [name for name in names if not _is_constant(left[name])]
        chosen = [left.pop(name) for name in names]
        if not any(values.values.any() for values in chosen):
            zeros |= {values.name: values for values in chosen}
        else:
            figures.append(_figure(spec, chosen, phases, last_step, _drawn_limits(spec, names, limits, chance)))
    left |= zeros  # a chart without anything but 0 says less than its place costs
    others = [_figure(ChartSpec(name, (name,)), [left[name]], phases, last_step, []) for name in sorted(left)]
    return figures, others


def _with_margins(series: Mapping[str, Series]) -> Mapping[str, Series]:
    """The accuracies without the steps in which no margin can be positive, as the reference is the policy."""
    accuracies, margins = series.get("rewards/accuracies"), series.get("rewards/margins")
    if accuracies is None or margins is None:
        return series
    kept = without_steps(accuracies, margins.steps[margins.values == 0.0])
    rest = {name: values for name, values in series.items() if name != accuracies.name}
    return {**rest, kept.name: kept} if len(kept.steps) else rest


def _is_constant(series: Series) -> bool:
    """Whether a curve stays within 1 % of its size: where each pair gives one point, mean and spread are fixed."""
    low, high = float(series.values.min()), float(series.values.max())
    return len(series.values) > 1 and high - low <= 0.01 * max(abs(low), abs(high))


def _drawn_limits(
    spec: ChartSpec, names: Sequence[str], limits: Mapping[str, object], chance: Mapping[str, float]
) -> list[tuple[str, float]]:
    """(label, value) of the dashed lines of those ``names`` that are shown; kinds with the same chance share one."""
    drawn = [
        (f"{label} {format_number(value, spec.percent)}", float(value))
        for label, option, name in spec.alarm_limits
        if name in names and isinstance(value := limits.get(option), int | float)
    ]
    if spec.with_chance and len(chance) > 1:
        for rate in dict.fromkeys(chance.values()):
            kinds = " and ".join(kind for kind, value in chance.items() if value == rate)
            drawn.append((f"{kinds} by chance {format_number(rate, spec.percent)}", rate))
    return drawn


def _matching(patterns: Sequence[str], names: Mapping[str, object]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        found += [name for name in sorted(names, key=_kind_order) if fnmatchcase(name, pattern) and name not in found]
    return found


def _kind_order(name: str) -> tuple[int, str]:
    return (_KIND_COLORS.get(name.rsplit("/", 1)[-1], len(_KIND_COLORS)), name)


def _figure(
    spec: ChartSpec,
    chosen: Sequence[Series],
    phases: Sequence[Phase],
    last_step: int,
    limits: Sequence[tuple[str, float]],
) -> str:
    lines = []
    for index, series in enumerate(_usual(chosen) if spec.stacked else chosen):
        kind = series.name.rsplit("/", 1)[-1]
        color = _KIND_COLORS.get(kind, index) % NUM_COLORS
        window = max(1, len(series.values) // 20)
        smoothed = spec.smooth and not spec.stacked and window > 1 and len(series.values) > 30
        values = smooth(series.values, window) if smoothed else series.values
        lines.append(Line(series.name, series.steps, values, color, series.values if smoothed else None))
    chart = Chart(
        lines,
        _step_range(chosen, last_step),
        _range_after_start(lines, last_step) if spec.cut_start else spec.y_range,
        phases,
        limits,
        spec.percent,
        spec.stacked,
        width=1204.0 if spec.wide else 590.0,
        height=300.0 if spec.wide else 230.0,
    )
    legend = "".join(
        f'<li><span class="swatch c{line.color}"></span>{escape(line.label)} '
        f"<b>{format_number(float(line.values[-1]), spec.percent)}</b></li>"
        for line in lines
    )
    note = f'<p class="note">{escape(spec.note)}</p>' if spec.note else ""
    return (
        f'<figure class="card{" wide" if spec.wide else ""}"><figcaption>{escape(spec.title)}</figcaption>{note}'
        f'<ul class="legend">{legend}</ul><div class="plot">{render(chart)}</div>{_hover_data(chart)}</figure>'
    )


def _usual(chosen: Sequence[Series]) -> list[Series]:
    """What a usual step is made of, over a twentieth of the steps: medians, which a single slow step does not move, and
    means of what is done every so many steps, which a median would not show."""
    whole = filled(chosen)
    window = len(whole[0].steps) // 20
    if window <= 1:
        return whole
    return [
        Series(one.name, one.steps, (smooth if _is_rare(one) else running_median)(one.values, window)) for one in whole
    ]


def _is_rare(series: Series) -> bool:
    """Whether it has a value in fewer than half of the steps from its first to its last."""
    at = np.flatnonzero(series.values)
    return len(at) > 0 and 2 * len(at) < at[-1] - at[0] + 1


def _step_range(chosen: Sequence[Series], last_step: int) -> tuple[float, float]:
    """From a little before the first value, as most scalars begin with a late phase, to the run's last step."""
    last = max(float(last_step), 2.0)
    first = min(float(series.steps[0]) for series in chosen)
    return max(1.0, min(first, last - 1.0) - 0.06 * (last - first)), last


def _range_after_start(lines: Sequence[Line], last_step: int) -> tuple[float, float] | None:
    """What the values need after the first tenth of the steps; None if that leaves nothing."""
    kept = [(line, line.steps > 0.1 * last_step) for line in lines]
    rest = [Line(line.label, line.steps[mask], line.values[mask], line.color) for line, mask in kept if mask.any()]
    return value_range(rest) if rest else None


def _hover_data(chart: Chart) -> str:
    """What the page's script shows under the pointer; without scripts the chart is complete but for this."""
    series = []
    for line in chart.lines:
        steps, values = thin(line.steps, line.values, MAX_POINTS)
        series.append(
            {
                "name": line.label,
                "color": line.color,
                "x": [round(float(step), 1) for step in steps],
                "y": [format_number(float(value), chart.percent) for value in values],
            }
        )
    data = {"x": chart.x_range, "left": LEFT, "right": RIGHT, "width": chart.width, "series": series}
    # "<" is escaped so that no name can end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
