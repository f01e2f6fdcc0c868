"""Warnings of the libraries below us that a user can do nothing about, by their exact beginnings; all others show.

Applied when the package is imported, which comes before the imports that warn.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # Megatron-Core, once per module: requirements-cuda.txt says where Transformer Engine and Apex come from.
    (UserWarning, "Transformer Engine and Apex are not installed"),
    (UserWarning, "Apex is not installed"),
    # Defaults of Megatron-Core's own, which we do not set.
    (UserWarning, "full scope is deprecated. Use empty cuda_graph"),
    (UserWarning, "MimoModelConfig is experimental"),
    # Its optimizer asks after the gradient of views of the parameters.
    (UserWarning, "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    # Its collectives go by the names that older versions of torch know.
    (FutureWarning, r"`torch.distributed.\w+` is deprecated"),
    # So does its loader of checkpoints.
    (FutureWarning, "Please use DTensor instead and we are deprecating ShardedTensor"),
    (FutureWarning, "`load_state_dict` is deprecated"),
    (UserWarning, "The argument order of load has been changed"),
    # Each rank reads a checkpoint's common part by itself.
    (UserWarning, "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load"),
)

_CUDA_ADVICE: tuple[tuple[type[Warning], str], ...] = (
    (UserWarning, "When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE_MAX"),
)

_LOGGED: dict[str, str] = {
    # 0.19 on: there is no successor that has what SIP needs of GPTModel.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # 0.16: of classes derived from its MLP, as ours is (model/layers.py).
    "megatron.core.transformer.transformer_layer": "Unknown MLP type",
    # 0.19: it then computes the layout itself, as 0.16 does.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    # 0.19: only the plan of the save is Megatron-Core's (checkpoint/writing.py).
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""Logger -> beginning of the message."""


def hide_known_warnings() -> None:
    """Hides what is listed above; a second call changes nothing."""
    _hide(_WARNINGS)
    for name, beginning in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hides) for known in logger.filters):
            logger.addFilter(_Hides(beginning))


def hide_cuda_advice() -> None:
    """Hides advice on CUDA's settings where there is no CUDA."""
    _hide(_CUDA_ADVICE)


def _hide(known: tuple[tuple[type[Warning], str], ...]) -> None:
    for category, beginning in known:
        warnings.filterwarnings("ignore", beginning, category)


class _Hides(logging.Filter):
    """Drops records whose message starts in one way."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
