"""Saves and loads checkpoints: at which step, which one, and what happens when it goes wrong."""

from __future__ import annotations

import importlib.metadata
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_sip.checkpoint import layout, writing
from megatron_sip.checkpoint.background import BackgroundWriter, Outcome, write_outcome
from megatron_sip.checkpoint.config import CheckpointConfig
from megatron_sip.checkpoint.identity import ModelIdentity, check_identity
from megatron_sip.checkpoint.reading import check_nothing_is_left, load_sharded, read_common, read_index, request
from megatron_sip.distributed import ParallelContext
from megatron_sip.errors import CheckpointError

logger = logging.getLogger(__name__)

SHARDING: Mapping[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""How sharded state is laid out, so that it loads at any TP x PP x DP. Checkpoints carry it as Megatron-LM's do."""

REFERENCE = "reference"
"""Part of a state dict that a checkpoint may lack: the loaded weights are then the reference."""

CHECKPOINT_VERSION = 3.0
"""Megatron-LM's number for the layout of its state dict."""


class StateBuilder(Protocol):
    """Makes the sharded state dict: ``model`` (or ``model0``, ...), ``optimizer`` if wanted, ``reference`` if any.

    The keys of the reference's tensors begin with ``reference.``; ``load`` leaves it out where the checkpoint has none,
    and where weights alone are loaded.
    """

    def __call__(self, *, is_loading: bool, with_optimizer: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """``metadata`` goes to every ``sharded_state_dict`` of Megatron-Core."""
        ...


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's contents, on every rank."""

    directory: Path
    step: int
    """Steps done; 0 after a load of weights alone."""
    state: dict[str, Any]
    """What the state builder described, filled."""
    common: dict[str, Any]
    """What ``save`` was given; empty after a load of weights alone, and after one of Megatron-LM's checkpoints."""
    weights_only: bool
    """Whether optimizer and progress were left behind (--finetune, --pretrained-checkpoint)."""


@dataclass(frozen=True)
class _Save:
    """A save under way."""

    step: int
    partial: Path
    planned: writing.WritePlan
    writer: BackgroundWriter


class CheckpointManager:
    """Owns the directory of a run's checkpoints. All methods that say so are collective over the job."""

    def __init__(self, config: CheckpointConfig, context: ParallelContext, identity: ModelIdentity) -> None:
        self._config = config
        self._context = context
        self._identity = identity
        self._pending: _Save | None = None
        self._last_saved: int | None = None
        self.num_failures = 0
        """Saves that failed, where the run goes on after one."""

    @property
    def last_saved(self) -> int | None:
        """Step of the latest checkpoint that this run has completed."""
        return self._last_saved

    def due(self, step: int, last: bool = False) -> bool:
        """Whether to save after ``step`` steps; ``last`` is true at the end of the run, however it comes."""
        if self._config.save is None or self._in_hand == step:
            return False
        return last or (self._config.save_interval is not None and step % self._config.save_interval == 0)

    def save(self, step: int, build_state: StateBuilder, common: Mapping[str, Any]) -> bool:
        """Saves, or with --async-save starts to, after waiting for an earlier save. Collective.

        ``common`` must be the same on all ranks, and made of dicts, lists, tuples, numbers, strings and tensors.

        Returns:
            False if it failed and the run is to go on (--on-save-failure continue); the log says why.

        Raises:
            CheckpointError: it failed on some rank; earlier checkpoints are intact.
        """
        assert self._config.save is not None, "ask due() before"
        succeeded = self.finish()
        root = Path(self._config.save)
        partial, error = self._context.broadcast_from_rank_zero(self._begin(root, step))
        if error:
            return self._fail(error)
        state = build_state(is_loading=False, with_optimizer=not self._config.no_save_optim, metadata=dict(SHARDING))
        state |= self._common(step, common)
        planned = writing.plan(state, partial, self._context)
        if not self._config.async_save:
            return self._complete(step, partial, planned, write_outcome(planned)) and succeeded
        timeout_s = 60 * self._config.async_save_timeout_minutes
        self._pending = _Save(step, partial, planned, BackgroundWriter(planned, timeout_s))
        return succeeded

    def poll(self) -> bool:
        """Completes a background save that all ranks have written. Collective; to be called once per step.

        Returns and raises as ``save`` does.
        """
        if self._pending is None:
            return True
        outcome = self._pending.writer.poll()
        failed = outcome is not None and bool(outcome.error)
        if self._context.any_rank(failed):
            # One rank's failure is the save's: the other writers are ended, not waited for.
            return self._end_pending(outcome or Outcome([], ""))
        if self._context.any_rank(outcome is None):
            return True
        assert outcome is not None
        return self._end_pending(outcome)

    def finish(self) -> bool:
        """Waits for a background save, if there is one. Collective; to be called before the run ends.

        Returns and raises as ``save`` does.
        """
        return True if self._pending is None else self._end_pending(self._pending.writer.wait())

    def close(self) -> None:
        """Ends a background save that no ``finish`` will complete, because the run has failed. Not collective."""
        if self._pending is not None:
            self._pending.writer.close()
            self._pending = None

    def load(self, build_state: StateBuilder) -> LoadedCheckpoint | None:
        """Loads what the options ask for; None if there is nothing to load and the run starts afresh. Collective.

        Raises:
            CheckpointError: the checkpoint is missing, half written, damaged or of another model.
        """
        config = self._config
        self._warn_of_another_run()
        directory, pretrained = self._agree(self._find)
        if directory is None:
            return None
        weights_only = config.finetune or pretrained or directory.name == layout.RELEASE
        common = self._agree(lambda: read_common(directory))
        self._agree(lambda: check_identity(directory, common, self._identity))
        stored = self._agree(lambda: read_index(directory))
        metadata = {**SHARDING, **(common.get(writing.CONTENT_METADATA) or {})}
        with_optimizer = not (weights_only or config.no_load_optim)
        state = build_state(is_loading=True, with_optimizer=with_optimizer, metadata=metadata)
        if weights_only or not stored.has(REFERENCE):
            state.pop(REFERENCE, None)
        asked = self._agree(lambda: request(state, stored, self._identity.vocab_size))
        requested = set().union(*self._gather(asked.keys()))
        self._agree(lambda: check_nothing_is_left(stored, requested))
        loaded = self._agree(lambda: load_sharded(asked))
        own = {} if weights_only else dict(common.get("run", {}))
        if config.no_load_rng:
            own.pop("rng", None)
        kept = {key: value for key, value in common.items() if key in state and with_optimizer}
        step = 0 if weights_only else int(common.get("iteration", 0))
        logger.info("loaded %s%s, step %d", directory, " (weights only)" if weights_only else "", step)
        return LoadedCheckpoint(directory, step, _merge(kept, loaded), own, weights_only)

    @property
    def _in_hand(self) -> int | None:
        return self._pending.step if self._pending else self._last_saved

    def _common(self, step: int, common: Mapping[str, Any]) -> dict[str, Any]:
        _check_plain(common, "common")
        return {
            "iteration": step,
            "checkpoint_version": CHECKPOINT_VERSION,
            writing.CONTENT_METADATA: dict(SHARDING),
            "identity": self._identity.as_plain(),
            "run": dict(common),
        }

    def _begin(self, root: Path, step: int) -> tuple[Path, str]:
        partial = layout.partial_directory(root, step, secrets.token_hex(4))
        if self._context.rank == 0:
            try:
                root.mkdir(parents=True, exist_ok=True)
                layout.remove_leftovers(root)
                partial.mkdir()
            except OSError as error:
                return partial, f"{error}. {_what_is_left(root)}"
        return partial, ""

    def _end_pending(self, outcome: Outcome) -> bool:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        pending.writer.close()
        return self._complete(pending.step, pending.partial, pending.planned, outcome)

    def _complete(self, step: int, partial: Path, planned: writing.WritePlan, outcome: Outcome) -> bool:
        """From all ranks' outcomes to a checkpoint with its name, or to the same error on all ranks."""
        gathered: list[Any] | None = [None] * self._context.world_size if self._context.rank == 0 else None
        dist.gather_object(outcome, gathered, dst=0, group=self._context.host.world)
        error = ""
        if gathered is not None:
            error = next((f"rank {rank}: {o.error}" for rank, o in enumerate(gathered) if o.error), "")
            error = error or self._publish(step, partial, planned, [o.results for o in gathered])
            if error:
                shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back
                error = f"{error}. {_what_is_left(partial.parent)}"
        error = self._context.broadcast_from_rank_zero(error)
        if error:
            return self._fail(error)
        self._last_saved = step
        return True

    def _publish(
        self, step: int, partial: Path, planned: writing.WritePlan, results: list[writing.WriteResults]
    ) -> str:
        final = layout.step_directory(partial.parent, step)
        try:
            writing.finish(planned, results, partial)
            layout.write_manifest(partial, step, self._about())
            layout.publish(partial, final)
        except OSError as error:
            return str(error)
        logger.info("saved %s", final)
        self._prune(partial.parent, step)
        return ""

    def _prune(self, root: Path, step: int) -> None:
        if self._config.keep_last is None:
            return
        try:
            layout.prune(root, newest=step, keep=self._config.keep_last)
        except OSError as error:  # the checkpoint is whole all the same, and the next save tries again
            logger.warning("earlier checkpoints could not be deleted: %s", error)

    def _about(self) -> dict[str, Any]:
        context = self._context
        return {
            "megatron_core": importlib.metadata.version("megatron-core"),
            "torch": torch.__version__,
            "layout": f"TP {context.tp_size} x PP {context.pp_size} x DP {context.dp_size}",
            "identity": self._identity.as_plain(),
        }

    def _fail(self, error: str) -> bool:
        message = f"the checkpoint could not be saved to {self._config.save}: {error}"
        if self._config.on_save_failure == "stop":
            raise CheckpointError(f"{message}; mend the cause and start again.")
        self.num_failures += 1
        if self._context.rank == 0:
            logger.error("%s; training goes on (--on-save-failure continue)", message)
        return False

    def _warn_of_another_run(self) -> None:
        config = self._config
        if self._context.rank == 0 and config.save is not None and config.load is None:
            steps = layout.saved_steps(Path(config.save))
            if steps:
                logger.warning(
                    "--save %s already has a checkpoint of step %d, which this run will not resume (that takes --load) "
                    "and may replace",
                    config.save,
                    steps[-1],
                )

    def _find(self) -> tuple[Path | None, bool]:
        config = self._config
        if config.load is not None:
            directory = layout.resolve(Path(config.load), config.ckpt_step)
            if directory is not None:
                return directory, False
            if config.exit_on_missing_checkpoint or config.finetune:
                raise CheckpointError(f"--load {config.load} holds no checkpoint: correct the path.")
        if config.pretrained_checkpoint is not None:
            directory = layout.resolve(Path(config.pretrained_checkpoint), None)
            if directory is None:
                raise CheckpointError(
                    f"--pretrained-checkpoint {config.pretrained_checkpoint} holds no checkpoint: correct the path."
                )
            return directory, True
        if config.load is not None and self._context.rank == 0:
            # A run that resumes from its own checkpoints has none at first; any other --load was meant to hold one.
            level = logging.INFO if config.load == config.save else logging.WARNING
            logger.log(level, "--load %s holds no checkpoint: the run starts afresh", config.load)
        return None, False

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._context.world_size
        dist.all_gather_object(gathered, value, group=self._context.host.world)
        return gathered

    def _agree(self, act: Callable[[], Any]) -> Any:
        """Runs ``act`` on all ranks; if it fails on one, all raise its error in place of waiting for it for ever."""
        result, error = None, ""
        try:
            result = act()
        except CheckpointError as failure:
            error = str(failure)
        except OSError as failure:
            error = f"the checkpoint cannot be read: {failure}"
        errors = self._gather(error)
        first = next((f"{e} (rank {rank})" if rank else e for rank, e in enumerate(errors) if e), "")
        if first:
            raise CheckpointError(first)
        return result


def _what_is_left(root: Path) -> str:
    """Of earlier saves, after one that failed."""
    try:
        steps = layout.whole_steps(root)
    except OSError:
        return "Earlier ones are intact"
    if not steps:
        return "There is no earlier one"
    return f"Earlier ones are intact: the last whole one is of step {steps[-1]}"


def _merge(common: Any, sharded: Any) -> Any:
    """What was written whole, completed by what was written in shards."""
    if isinstance(common, Mapping) and isinstance(sharded, Mapping):
        return {key: _merge(common.get(key), sharded.get(key)) for key in {**common, **sharded}}
    return common if sharded is None else sharded


def _check_plain(value: Any, name: str) -> None:
    """Refuses, before anything is written, what could be saved but not loaded again."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]")
    elif not isinstance(value, int | float | str | bytes | torch.Tensor | None):
        raise TypeError(f"{name} is a {type(value).__name__}: checkpoints hold plain values and tensors")
