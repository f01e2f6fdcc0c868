"""Process groups, devices and the CPU platform."""

from typing import TYPE_CHECKING

from megatron_sip.distributed.config import ParallelConfig
from megatron_sip.lazy import imported_when_asked_for

if TYPE_CHECKING:
    from megatron_sip.distributed.context import HostGroups, ParallelContext, initialize
    from megatron_sip.distributed.cpu_linear import linear, writes_into
    from megatron_sip.distributed.device import (
        capture,
        communication_backend,
        device_memory_bytes,
        memory_metrics,
        pin,
        release_cached_memory,
        select_device,
        synchronize,
    )
    from megatron_sip.distributed.main_grad import mark_as_added
    from megatron_sip.distributed.platform import install_cpu_platform
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        context="HostGroups ParallelContext initialize",
        cpu_linear="linear writes_into",
        device="capture communication_backend device_memory_bytes memory_metrics pin release_cached_memory "
        "select_device synchronize",
        main_grad="mark_as_added",
        platform="install_cpu_platform",
    )

__all__ = [
    "HostGroups",
    "ParallelConfig",
    "ParallelContext",
    "capture",
    "communication_backend",
    "device_memory_bytes",
    "initialize",
    "install_cpu_platform",
    "linear",
    "mark_as_added",
    "memory_metrics",
    "pin",
    "release_cached_memory",
    "select_device",
    "synchronize",
    "writes_into",
]
