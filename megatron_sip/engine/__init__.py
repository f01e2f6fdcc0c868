"""The training engine: gradients, optimizer, learning rate, schedules and the reference policy.

``EngineConfig`` and ``LearningRate`` need no Megatron; ``Engine`` is imported from ``megatron_sip.engine.engine``.
"""

from megatron_sip.engine.config import EngineConfig
from megatron_sip.engine.lr import LearningRate

__all__ = ["EngineConfig", "LearningRate"]
