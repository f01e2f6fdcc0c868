"""The training engine: gradients, optimizer, learning rate, schedules and the reference policy.

``Engine`` is imported from ``megatron_sip.engine.engine``.
"""

from typing import TYPE_CHECKING

from megatron_sip.engine.config import EngineConfig
from megatron_sip.lazy import imported_when_asked_for

if TYPE_CHECKING:
    from megatron_sip.engine.lr import LearningRate
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        lr="LearningRate",
    )

__all__ = ["EngineConfig", "LearningRate"]
