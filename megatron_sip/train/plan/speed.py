"""Work -> seconds: rooflines whose roofs are the reached parts of the peaks.

Products and attention take the longer of their operations' and of their bytes' time (Williams et al. 2009); what moves
besides, launches and collectives come on top of them, since they are other kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sip.train.plan.costs import Work
from megatron_sip.train.plan.hardware import DeviceConfig, Hardware

COMPUTE, MEMORY, LAUNCHES, LINK = "arithmetic", "memory", "launches", "communication"


@dataclass(frozen=True)
class Pace:
    """What one kind of pass reaches of a device."""

    matmul: float
    """Shares of the peaks."""
    attention: float
    memory: float
    launch_us: float


@dataclass(frozen=True)
class Link:
    """What a group's collectives cross."""

    bandwidth_gb_s: float
    latency_us: float


def seconds_by_cause(work: Work, device: DeviceConfig, pace: Pace, link: Link | None = None) -> dict[str, float]:
    """COMPUTE, MEMORY, LAUNCHES and LINK -> seconds of one rank; they add up to the time of the pass."""
    peak, bandwidth = device.peak_tflops * 1e12, device.memory_bandwidth_gb_s * 1e9 * pace.memory
    causes = {COMPUTE: 0.0, MEMORY: work.moved_bytes / bandwidth, LAUNCHES: work.launches * pace.launch_us * 1e-6}
    for flops, share, size in (
        (work.matmul_flops, pace.matmul, work.weight_bytes),
        (work.attention_flops, pace.attention, work.cache_bytes),
    ):
        arithmetic, traffic = flops / (peak * share), size / bandwidth
        causes[COMPUTE if arithmetic >= traffic else MEMORY] += max(arithmetic, traffic)
    causes[LINK] = link_seconds(work, link)
    return causes


def link_seconds(work: Work, link: Link | None) -> float:
    """Time of the collectives of a pass."""
    if link is None:
        return 0.0
    return work.sent_bytes / (link.bandwidth_gb_s * 1e9) + work.collectives * link.latency_us * 1e-6


class Machine:
    """A hardware description with the number of ranks that work on it."""

    def __init__(self, hardware: Hardware, world_size: int) -> None:
        self.hardware = hardware
        self.device = hardware.device
        self._slowdown = hardware.efficiency.busy_slowdown if world_size > 1 else 1.0

    def pace(self, kind: str) -> Pace:
        """``train``, ``forward``, ``prefill``, ``decode`` or ``optimizer``."""
        values = vars(self.hardware.efficiency)
        memory, launch_us = values[f"{kind}_memory"], values[f"{kind}_launch_us"]
        if kind == "optimizer":
            return Pace(1.0, 1.0, memory, launch_us)
        return Pace(values[f"{kind}_matmul"], values[f"{kind}_attention"], memory, launch_us)

    def link(self, first_rank_distance: int, size: int) -> Link:
        """Of a group of ``size`` ranks that lie ``first_rank_distance`` ranks apart."""
        link = self.hardware.link
        if first_rank_distance * size <= self.device.devices_per_node:
            return Link(link.node_bandwidth_gb_s, link.node_latency_us)
        return Link(link.network_bandwidth_gb_s, link.network_latency_us)

    def causes(self, work: Work, kind: str, link: Link | None = None) -> Mapping[str, float]:
        """Seconds by cause, ranks of one node slowing each other down."""
        found = seconds_by_cause(work, self.device, self.pace(kind), link)
        return {cause: s * (1.0 if cause == LINK else self._slowdown) for cause, s in found.items()}
