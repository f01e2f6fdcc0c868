"""Hugging Face checkpoints in and out, tensor by tensor, without process groups and without a model in memory."""

from megatron_sip.checkpoint.huggingface.convert import to_hugging_face, to_megatron

__all__ = ["to_hugging_face", "to_megatron"]
