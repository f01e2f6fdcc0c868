"""The curriculum as a user writes it: a YAML list of phases, or the same in one line for the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sip.config.fields import option
from megatron_sip.config.suggest import did_you_mean
from megatron_sip.errors import ConfigurationError

STREAMS = ("ntp", "suffix", "rewrite", "rollout")
"""What a sample can be trained as. ``rollout`` is the judged stream: its candidates are the configured pool."""

_PHASE_KEYS = ("name", "steps", "ramp", "weights", "wait_for", *STREAMS)
_TRIGGER_KEYS = ("rollout_win_rate", "probe_every", "max_steps")


@dataclass(frozen=True)
class Trigger:
    """Holds a phase back until rollouts win often enough."""

    rollout_win_rate: float
    """The phase opens when a probe finds at least this share of judged groups won by a rollout, 0..1."""
    probe_every: int
    """Steps between probes while the phase waits."""
    max_steps: int | None
    """Steps to wait at most beyond the steps of the phase before; None waits for ever."""


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one mixture of streams."""

    name: str
    steps: int | None
    """None: until the end of training (last phase only)."""
    shares: Mapping[str, float]
    """Stream -> share of the global batch; sums to 1."""
    weights: Mapping[str, float]
    """Stream -> factor of its mean loss."""
    ramp: int = 0
    """Steps over which the mixture goes from that of the phase before to this one's."""
    wait_for: Trigger | None = None


@dataclass(frozen=True)
class CurriculumConfig:
    """Options of the curriculum. With neither of the two given it is off: every sample of every step is judged."""

    curriculum: str = option(
        "",
        help="phases in one line, separated by ';': MIXTURE[:STEPS][:KEY=VALUE...], where MIXTURE is stream=share"
        "[*loss weight], ... over ntp, suffix, rewrite and rollout, and KEY is name, ramp, win_rate, probe_every or "
        "max_steps; for example 'ntp:400; ntp=0.5,rewrite=0.5:60; ntp=0.5,rollout=0.5*2:200:ramp=20'. "
        "Default: off, every sample is judged ('rollout')",
        metavar="PHASES",
    )
    phases: tuple[Mapping[str, Any], ...] = option(
        default_factory=tuple,
        help="the same as a YAML list of {name, steps, ntp, suffix, rewrite, rollout, ramp, weights: {stream: weight}, "
        "wait_for: {rollout_win_rate, probe_every, max_steps}}",
        metavar="YAML",
    )

    def validate(self) -> None:
        """Raises ConfigurationError if the phases cannot be read."""
        self.parsed()

    def parsed(self) -> tuple[Phase, ...]:
        """The phases in order; one endless phase of rollouts if the curriculum is off."""
        if self.curriculum and self.phases:
            raise ConfigurationError(
                f"curriculum ({self.curriculum!r}) and phases ({len(self.phases)} of them) are both given: keep one"
            )
        entries: Sequence[Mapping[str, Any]] = self.phases
        if not entries:
            entries = [_compact_entry(part) for part in (self.curriculum or "rollout").split(";") if part.strip()]
        if not entries:
            raise ConfigurationError(f"curriculum {self.curriculum!r} has no phase: write for example 'ntp:400'")
        phases = tuple(_phase(entry, index) for index, entry in enumerate(entries))
        _check_sequence(phases)
        return phases


@dataclass
class _Compact:
    """What one phase of the one-line form has said so far."""

    entry: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    trigger: dict[str, Any] = field(default_factory=dict)


def _compact_entry(text: str) -> dict[str, Any]:
    """``'ntp=0.5,rollout=0.5*2:200:ramp=20'`` -> the mapping that the YAML form would hold."""
    mixture, *rest = [part.strip() for part in text.strip().split(":")]
    found = _Compact()
    for item in mixture.split(","):
        stream, _, value = item.partition("=")
        share, star, weight = value.partition("*")
        if stream.strip() in found.entry:
            raise ConfigurationError(
                f"curriculum phase {text.strip()!r} names {stream.strip()!r} twice: give each stream one share"
            )
        found.entry[stream.strip()] = _number(share, f"share in {item.strip()!r}") if share.strip() else 1.0
        if star:
            found.weights[stream.strip()] = _number(weight, f"loss weight in {item.strip()!r}")
    for item in rest:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            found.entry["steps"] = _number(key, f"number of steps in {text.strip()!r}")
        elif key in ("name", "ramp"):
            found.entry[key] = value if key == "name" else _number(value, f"ramp in {text.strip()!r}")
        elif key in ("win_rate", "probe_every", "max_steps"):
            name = "rollout_win_rate" if key == "win_rate" else key
            found.trigger[name] = _number(value, f"{key} in {text.strip()!r}")
        else:
            raise ConfigurationError(
                f"curriculum phase {text.strip()!r} has an unknown key {key!r}: use name, ramp, win_rate, probe_every "
                "or max_steps"
            )
    if found.weights:
        found.entry["weights"] = found.weights
    if found.trigger:
        found.entry["wait_for"] = found.trigger
    return found.entry


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"curriculum: the {what} is {text!r}: write a number") from None


def _check_keys(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            near = did_you_mean(str(key), list(known))
            raise ConfigurationError(f"{where}: unknown key {key!r}{near}; there are {', '.join(known)}")


def _real(value: Any, where: str, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bound = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise ConfigurationError(f"{where} is {value!r}: give a number {bound}")
    return float(value)


def _whole(value: Any, where: str, low: int) -> int:
    number = _real(value, where, low)
    if number != int(number):
        raise ConfigurationError(f"{where} is {value!r}: give a whole number")
    return int(number)


def _phase(entry: Mapping[str, Any], index: int) -> Phase:
    if not isinstance(entry, Mapping):
        raise ConfigurationError(f"phase {index + 1} is {entry!r}: write a mapping such as {{name: warm-up, ntp: 1.0}}")
    name = str(entry.get("name") or f"{index + 1}:{'+'.join(s for s in STREAMS if entry.get(s))}")
    where = f"curriculum phase {name!r}"
    _check_keys(entry, _PHASE_KEYS, where)
    shares = {s: _real(entry[s], f"{where}: the share of {s}", 0, 1) for s in STREAMS if s in entry}
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise ConfigurationError(f"{where}: the shares {shares} sum to {total:g}: make them sum to 1")
    weights = entry.get("weights") or {}
    if not isinstance(weights, Mapping):
        raise ConfigurationError(f"{where}: weights is {weights!r}: write a mapping such as {{ntp: 1.0}}")
    _check_keys(weights, STREAMS, f"{where}: weights")
    steps = entry.get("steps")
    return Phase(
        name=name,
        steps=None if steps is None else _whole(steps, f"{where}: steps", 1),
        shares={s: shares.get(s, 0.0) for s in STREAMS},
        weights={s: _real(weights.get(s, 1.0), f"{where}: the weight of {s}", 0) for s in STREAMS},
        ramp=_whole(entry.get("ramp", 0), f"{where}: ramp", 0),
        wait_for=None if entry.get("wait_for") is None else _trigger(entry["wait_for"], where),
    )


def _trigger(entry: Any, where: str) -> Trigger:
    where = f"{where}: wait_for"
    if not isinstance(entry, Mapping) or "rollout_win_rate" not in entry:
        raise ConfigurationError(f"{where} is {entry!r}: give at least the win rate, {{rollout_win_rate: 0.2}}")
    _check_keys(entry, _TRIGGER_KEYS, where)
    max_steps = entry.get("max_steps")
    return Trigger(
        rollout_win_rate=_real(entry["rollout_win_rate"], f"{where}: rollout_win_rate", 0, 1),
        probe_every=_whole(entry.get("probe_every", 25), f"{where}: probe_every", 1),
        max_steps=None if max_steps is None else _whole(max_steps, f"{where}: max_steps", 0),
    )


def _check_sequence(phases: Sequence[Phase]) -> None:
    names = [phase.name for phase in phases]
    for index, phase in enumerate(phases):
        where = f"curriculum phase {phase.name!r}"
        if names.index(phase.name) != index:
            raise ConfigurationError(f"{where} is there twice: give each phase a name of its own")
        if phase.steps is None and index + 1 < len(phases):
            raise ConfigurationError(f"{where} has no number of steps: only the last phase may go on for ever")
        if index == 0 and (phase.ramp or phase.wait_for):
            raise ConfigurationError(f"{where} is the first: it has no phase before it to ramp or to wait from")
        if phase.steps is not None and phase.ramp > phase.steps:
            raise ConfigurationError(f"{where}: ramp {phase.ramp} is longer than its {phase.steps} steps: shorten it")
