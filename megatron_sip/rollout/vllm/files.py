"""Hands weights to servers as a model directory: every pipeline stage writes one file of it."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sip.distributed import ParallelContext
from megatron_sip.huggingface.config_json import CONFIG
from megatron_sip.huggingface.safetensors_files import FileWriter, Plan, write_index
from megatron_sip.rollout.vllm.weights import StageWeights


class WeightFiles:
    """Versions of the policy in a folder of this run's own, the last of them kept.

    Args:
        weights: of this rank's stage.
        context: of the job. Only the first data-parallel replica writes.
        parent: where the folder is made.
        model_config: ``config.json`` of the model.
    """

    def __init__(
        self, weights: StageWeights, context: ParallelContext, parent: Path, model_config: Mapping[str, Any]
    ) -> None:
        self._weights = weights
        self._context = context
        self._model_config = model_config
        name = context.broadcast_from_rank_zero(f"megatron-sip-{secrets.token_hex(6)}")
        self.folder = parent / name

    def write(self, version: str) -> tuple[Path, str]:
        """(directory, "") of the new version, or what went wrong; to be called on all ranks of the first replica.

        The answer counts on the leader; versions before this one are still there.
        """
        context = self._context
        directory = self.folder / f"version-{version}"
        name = f"model-{context.pp_rank + 1:05d}-of-{context.pp_size:05d}.safetensors"
        plan = self._weights.plan()
        own = (name, plan, self._write_stage(directory / name, plan))
        parts: list[Any] = [None] * context.host.model_parallel.size()
        dist.all_gather_object(parts, own, group=context.host.model_parallel)
        problem = next((problem for _, _, problem in parts if problem), "")
        if context.is_leader and not problem:
            problem = self._finish(directory, {name: plan for name, plan, _ in parts})
        return directory, problem

    def keep_only(self, directory: Path) -> None:
        """Removes the other versions."""
        for other in self.folder.iterdir():
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """Leaves nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_stage(self, path: Path, plan: Plan) -> str:
        """What went wrong, or "". All tensor-parallel ranks iterate to the end; the first of them writes."""
        if self._context.tp_rank > 0:
            for _ in self._weights:
                pass
            return ""
        problem, writer = "", None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = FileWriter(path, plan)
        except OSError as error:
            problem = _told(error, path)
        for name, tensor in self._weights:
            if problem or writer is None:
                continue
            try:
                writer.add(name, tensor.cpu())
            except OSError as error:
                problem = _told(error, path)
        if writer is not None:
            writer.__exit__(None, None, None)
        return problem

    def _finish(self, directory: Path, files: Mapping[str, Plan]) -> str:
        try:
            (directory / CONFIG).write_text(json.dumps(self._model_config), encoding="utf-8")
            write_index(directory, files)
        except OSError as error:
            return _told(error, directory)
        return ""


def _told(error: OSError, path: Path) -> str:
    return (
        f"weights for the rollout servers cannot be written to {error.filename or path}: {error.strerror}; give a "
        "folder with room for them as --rollout-weights-folder"
    )
