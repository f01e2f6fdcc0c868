"""Hugging Face checkpoints in and out, tensor by tensor, without process groups and without a model in memory."""

from typing import TYPE_CHECKING

from megatron_sip.lazy import imported_when_asked_for

if TYPE_CHECKING:
    from megatron_sip.checkpoint.huggingface.convert import to_hugging_face, to_megatron
else:
    __getattr__ = imported_when_asked_for(__name__, convert="to_hugging_face to_megatron")

__all__ = ["to_hugging_face", "to_megatron"]
