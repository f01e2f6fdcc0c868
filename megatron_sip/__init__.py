"""Self-Improving Pretraining on Megatron-Core."""

from megatron_sip.library_warnings import hide_known_warnings

__version__ = "0.1.0"

hide_known_warnings()
