"""Self-Improving Pretraining on Megatron-Core."""

__version__ = "0.1.0"
