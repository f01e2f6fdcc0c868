"""Line charts and stacked areas as inline SVG, coloured by CSS classes so that light and dark themes share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from megatron_sip.observability.report.series import Phase, Values, thin

LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 22.0, 26.0
MAX_POINTS = 300


@dataclass(frozen=True)
class Line:
    """One curve. ``color`` numbers a class of the style sheet; ``raw`` are unsmoothed values, drawn faintly behind."""

    label: str
    steps: Values
    values: Values
    color: int
    raw: Values | None = None


@dataclass(frozen=True)
class Chart:
    """What one chart shows; the frame is in pixels at full size."""

    lines: Sequence[Line]
    x_range: tuple[float, float]
    y_range: tuple[float, float] | None = None
    """None: what the values need."""
    phases: Sequence[Phase] = ()
    limits: Sequence[tuple[str, float]] = field(default=())
    """Dashed horizontal lines with their labels."""
    percent: bool = False
    stacked: bool = False
    width: float = 590.0
    height: float = 230.0


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_number(value: float, percent: bool = False) -> str:
    """Short for an axis or a legend."""
    if percent:
        return f"{100 * value:.3g}%"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.1e}"


def value_range(lines: Sequence[Line], limits: Sequence[tuple[str, float]] = ()) -> tuple[float, float]:
    """What the lines need, with a little air. A few peaks do not flatten all the rest: what lies far beyond the
    middle 96 % is cut off."""
    values = np.concatenate([line.values if line.raw is None else line.raw for line in lines])
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(value) for value in np.percentile(values, [2, 98]))
    # Smoothed curves must stay inside, whatever is cut from the raw ones.
    inner_low = min([inner_low, *(float(line.values.min()) for line in lines if line.raw is not None)])
    inner_high = max([inner_high, *(float(line.values.max()) for line in lines if line.raw is not None)])
    reach = 1.5 * (inner_high - inner_low)
    if reach > 0:
        low, high = max(low, inner_low - reach), min(high, inner_high + reach)
    low, high = min([low, *(value for _, value in limits)]), max([high, *(value for _, value in limits)])
    if high == low:
        return (min(0.0, 1.5 * low), max(0.0, 1.5 * high)) if low else (0.0, 1.0)
    air = 0.04 * (high - low)
    # A curve that is never negative gets no axis below 0.
    return (0.0 if low >= 0 and low - air < 0 else low - air, high + air)


def stack(lines: Sequence[Line]) -> tuple[Values, list[Values]]:
    """Common steps and the running sums of the lines, bottom first; a line counts 0 where it has no value."""
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    total = np.zeros(len(steps))
    sums = []
    for line in lines:
        total = total.copy()
        total[np.searchsorted(steps, line.steps)] += line.values
        sums.append(total)
    return steps, sums


class _Frame:
    """Maps steps and values to pixels."""

    def __init__(self, chart: Chart, y_range: tuple[float, float]) -> None:
        self.chart = chart
        self.x0, self.x1 = chart.x_range
        self.y0, self.y1 = y_range
        self.inner_width = chart.width - LEFT - RIGHT
        self.inner_height = chart.height - TOP - BOTTOM

    def x(self, step: float) -> float:
        span = (self.x1 - self.x0) or 1.0
        return LEFT + self.inner_width * (step - self.x0) / span

    def y(self, value: float) -> float:
        return TOP + self.inner_height * (1.0 - (value - self.y0) / (self.y1 - self.y0))


def render(chart: Chart) -> str:
    """The chart as an ``<svg>`` element; all text in it is escaped."""
    if chart.stacked:
        steps, sums = stack(chart.lines)
        # A rare slow step (a checkpoint) is clipped too.
        top = Line("", steps, sums[-1], 0)
        y_range = chart.y_range or (0.0, value_range([top])[1])
    else:
        y_range = chart.y_range or value_range(chart.lines, chart.limits)
    frame = _Frame(chart, y_range)
    parts = [
        f'<svg viewBox="0 0 {chart.width:g} {chart.height:g}" role="img" class="chart">',
        *_phases(frame),
        *_axes(frame),
        *_limits(frame),
        # A nested svg cuts off what lies outside the frame.
        f'<svg class="curves" x="{LEFT:g}" y="{TOP:g}" width="{frame.inner_width:g}" height="{frame.inner_height:g}" '
        f'viewBox="{LEFT:g} {TOP:g} {frame.inner_width:g} {frame.inner_height:g}">',
    ]
    if chart.stacked:
        parts += _areas(frame, steps, sums)
    else:
        parts += [_path(frame, line.steps, line.raw, line, faint=True) for line in chart.lines if line.raw is not None]
        parts += [_path(frame, line.steps, line.values, line, faint=False) for line in chart.lines]
    parts.append(
        f'</svg><line class="cursor" y1="{TOP:g}" y2="{TOP + frame.inner_height:g}" visibility="hidden"/></svg>'
    )
    return "".join(parts)


def _phases(frame: _Frame) -> list[str]:
    parts = []
    numbers: dict[str, int] = {}
    for phase in frame.chart.phases:
        number = numbers.setdefault(phase.name, len(numbers))
        # A phase reaches to the step before the next one begins, hence the half steps.
        left, right = frame.x(max(phase.first - 0.5, frame.x0)), frame.x(min(phase.last + 0.5, frame.x1))
        if right <= left:
            continue
        title = f"{phase.name}: steps {phase.first} to {phase.last}"
        parts.append(
            f'<g class="phase p{number % 4}"><title>{escape(title)}</title><rect x="{left:.1f}" y="{TOP:g}" '
            f'width="{right - left:.1f}" height="{frame.inner_height:g}"/>'
        )
        if right - left > 6.2 * len(phase.name):
            parts.append(f'<text x="{left + 3:.1f}" y="{TOP - 7:g}" class="phase-name">{escape(phase.name)}</text>')
        parts.append("</g>")
    return parts


def _axes(frame: _Frame) -> list[str]:
    chart = frame.chart
    right, bottom = LEFT + frame.inner_width, TOP + frame.inner_height
    parts = []
    for tick in nice_ticks(frame.y0, frame.y1, 5 if chart.height > 200 else 3):
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{format_number(tick, chart.percent)}</text>"
        )
    for tick in nice_ticks(frame.x0, frame.x1, max(2, int(chart.width / 80))):
        if tick == int(tick):
            x = frame.x(tick)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15:g}" text-anchor="middle">{int(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    return parts


def _limits(frame: _Frame) -> list[str]:
    parts = []
    for label, value in frame.chart.limits:
        y = frame.y(value)
        parts.append(f'<line class="limit" x1="{LEFT:g}" x2="{LEFT + frame.inner_width:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="limit-name" x="{LEFT + frame.inner_width - 3:g}" y="{y - 4:.1f}" text-anchor="end">'
            f"{escape(label)}</text>"
        )
    return parts


def _path(frame: _Frame, steps: Values, values: Values, line: Line, faint: bool) -> str:
    steps, values = thin(steps, values, MAX_POINTS)
    gaps = np.diff(steps)
    # A series that pauses, as between two rollout phases, is not joined over the pause.
    longest = 6.0 * float(np.median(gaps)) if len(gaps) else 0.0
    commands = []
    for index, (step, value) in enumerate(zip(steps, values, strict=True)):
        move = index == 0 or gaps[index - 1] > longest
        commands.append(f"{'M' if move else 'L'}{frame.x(step):.1f} {frame.y(value):.1f}")
    title = f"{line.label}: {format_number(float(values[-1]), frame.chart.percent)} at step {steps[-1]:.0f}"
    style = f"line c{line.color}" + (" faint" if faint else "")
    marks = ""
    if not faint and len(steps) <= 30:
        marks = "".join(
            f'<circle class="dot c{line.color}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="2.2"/>'
            for step, value in zip(steps, values, strict=True)
        )
    return f'<path class="{style}" d="{"".join(commands)}"><title>{escape(title)}</title></path>{marks}'


def _areas(frame: _Frame, steps: Values, sums: Sequence[Values]) -> list[str]:
    parts = []
    below = np.zeros(len(steps))
    for line, above in zip(frame.chart.lines, sums, strict=True):
        x, top = thin(steps, above, MAX_POINTS)
        _, base = thin(steps, below, MAX_POINTS)
        forth = [f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in zip(x, top, strict=True)]
        back = [f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in zip(x, base, strict=True)][::-1]
        title = f"{line.label}: mean {format_number(float(line.values.mean()))}"
        parts.append(
            f'<path class="area c{line.color}" d="M{"L".join(forth + back)}Z"><title>{escape(title)}</title></path>'
        )
        below = above
    return parts
