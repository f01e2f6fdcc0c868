"""Checkpoints in Megatron-Core's format: atomic, resharding, asynchronous; signals that ask a run to stop."""

from typing import TYPE_CHECKING

from megatron_sip.checkpoint.config import CheckpointConfig
from megatron_sip.lazy import imported_when_asked_for

if TYPE_CHECKING:
    from megatron_sip.checkpoint.identity import ModelIdentity, identity_of
    from megatron_sip.checkpoint.manager import SHARDING, CheckpointManager, LoadedCheckpoint, StateBuilder
    from megatron_sip.checkpoint.signals import StopDecision, StopSignals, StopWatch
else:
    __getattr__ = imported_when_asked_for(
        __name__,
        identity="ModelIdentity identity_of",
        manager="SHARDING CheckpointManager LoadedCheckpoint StateBuilder",
        signals="StopDecision StopSignals StopWatch",
    )

__all__ = [
    "SHARDING",
    "CheckpointConfig",
    "CheckpointManager",
    "LoadedCheckpoint",
    "ModelIdentity",
    "StateBuilder",
    "StopDecision",
    "StopSignals",
    "StopWatch",
    "identity_of",
]
