"""What the ranks of a launch do with checkpoints, and report."""

from __future__ import annotations

import os
import resource
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_sip.checkpoint import (
    SHARDING,
    CheckpointConfig,
    CheckpointManager,
    ModelIdentity,
    background,
    identity_of,
    inspection,
    layout,
    room,
)
from megatron_sip.distributed import ParallelConfig, ParallelContext, initialize
from megatron_sip.errors import CheckpointError
from megatron_sip.model.build import build_model
from megatron_sip.model.config import ModelConfig
from tests.checkpoint.trainee import VOCABULARY, Trainee, config_of, model_of
from tests.limits import largest_file

IDENTITY = ModelIdentity(61, "tokenizer-a", {"num_layers": 2, "hidden_size": 32, "num_query_groups": 2})
COMMON = {"consumed": {"ntp": 24}, "rng": {"seed": 7}, "blob": torch.arange(3)}


def manager(
    context: ParallelContext, root: str, identity: ModelIdentity = IDENTITY, **options: Any
) -> CheckpointManager:
    """A manager that saves to and loads from ``root``."""
    return CheckpointManager(CheckpointConfig(**{"save": root, "load": root, **options}), context, identity)


def error_of(act: Any) -> str:
    """The message of the CheckpointError that ``act`` raises, "" if it raises none."""
    try:
        act()
    except CheckpointError as error:
        return str(error)
    return ""


def two_data_parallel_ranks(root: str) -> dict[str, Any]:
    """Everything that needs two ranks at one layout; leaves a checkpoint of step 3 in ``root/story``."""
    context = initialize(ParallelConfig(), seed=5)
    trainee = Trainee(context)
    report: dict[str, Any] = {"first": trainee.train(0, 3)}
    saver = manager(context, f"{root}/story")
    report["saved"] = saver.save(3, trainee.state, COMMON)
    at_three = trainee.weights()
    quick = manager(context, f"{root}/async", async_save=True)
    trained_on = Path(root) / f"trained_on_{context.rank}"
    with _writers_that_wait(trained_on.exists):
        quick.save(3, trainee.state, COMMON)
    report["straight"] = trainee.train(3, 12)  # must not change what is to be written
    report["at_work"] = quick._pending is not None and quick._pending.writer.poll() is None
    trained_on.touch()
    report["finished"] = quick.finish() and quick.last_saved == 3
    for name in ("story", "async"):
        resumed, loaded = _resume(context, f"{root}/{name}")
        report[name] = {"step": loaded.step, "run": loaded.common, "at_load": resumed.weights() == at_three}
        report[name]["losses"] = resumed.train(3, 12)
        report[name]["weights"] = resumed.weights() == trainee.weights()
    report["failures"] = _failures(context, trainee, root)
    report["kept"] = _keep_two(context, trainee, f"{root}/kept")
    report["refusals"] = _refusals(context, trainee, f"{root}/story")
    return report


def _resume(context: ParallelContext, root: str, **options: Any) -> tuple[Trainee, Any]:
    trainee = Trainee(context)
    loaded = manager(context, root, **options).load(trainee.state)
    assert loaded is not None
    trainee.take(loaded.state)
    return trainee, loaded


def _failures(context: ParallelContext, trainee: Trainee, root: str) -> dict[str, Any]:
    """Saves of step 4 that fail, into a directory that holds step 3."""
    path = f"{root}/failing"
    manager(context, path).save(3, trainee.state, COMMON)
    messages: dict[str, Any] = {}
    for name, rank, size in (("shard", 1, 50_000), ("common", 0, 1_000)):
        with largest_file(size if context.rank == rank else resource.RLIM_INFINITY):
            messages[name] = error_of(lambda: manager(context, path).save(4, trainee.state, COMMON))
            tolerant = manager(context, path, on_save_failure="continue")
            messages[f"{name}_tolerated"] = (tolerant.save(4, trainee.state, COMMON), tolerant.num_failures)
            quick = manager(context, path, async_save=True)
            quick.save(4, trainee.state, COMMON)
            messages[f"{name}_async"] = error_of(quick.finish)
    with largest_file(50_000 if context.rank == 1 else resource.RLIM_INFINITY), _free_bytes(1_234):
        messages["full"] = error_of(lambda: manager(context, path).save(4, trainee.state, COMMON))
        quick = manager(context, path, async_save=True)
        quick.save(4, trainee.state, COMMON)
        messages["full_async"] = error_of(quick.finish)
        messages["first"] = error_of(lambda: manager(context, f"{root}/first").save(4, trainee.state, COMMON))
    with _writers_that_wait(lambda: False):
        quick = manager(context, path, async_save=True)
        quick.save(4, trainee.state, COMMON)
        if context.rank == 1:
            assert quick._pending is not None
            os.kill(quick._pending.writer.pid, signal.SIGKILL)
        messages["killed"] = error_of(lambda: _poll_until_done(quick))
        slow = manager(context, path, async_save=True, async_save_timeout_minutes=0.01)
        slow.save(4, trainee.state, COMMON)
        messages["timeout"] = error_of(lambda: _poll_until_done(slow))
    context.barrier()
    messages["names"] = sorted(os.listdir(path))
    messages["still"] = _resume(context, path)[1].step
    quick = manager(context, path, async_save=True)
    quick.save(4, trainee.state, COMMON)
    _poll_until_done(quick)
    messages["then"] = quick.last_saved
    return messages


@contextmanager
def _free_bytes(number: int) -> Iterator[None]:
    """The file system is said to have that many left: what torch raises is the same for every write cut short."""
    before = room.shutil
    room.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=number))
    try:
        yield
    finally:
        room.shutil = before


def _poll_until_done(quick: CheckpointManager) -> None:
    started = time.monotonic()
    while quick._pending is not None:
        assert time.monotonic() - started < 20
        quick.poll()
        time.sleep(0.02)


def _keep_two(context: ParallelContext, trainee: Trainee, root: str) -> list[str]:
    keeper = manager(context, root, keep_last=2, save_interval=10)
    for step in (10, 15, 20, 30):
        if keeper.due(step):
            keeper.save(step, trainee.state, COMMON)
    assert not keeper.due(30, last=True) and keeper.due(31, last=True)
    context.barrier()
    return sorted(os.listdir(root))


def _refusals(context: ParallelContext, trainee: Trainee, root: str) -> dict[str, str]:
    deeper = ModelIdentity(61, "tokenizer-a", {"num_layers": 3})
    unknown = ModelIdentity(61)
    three_layers, wide = Trainee(context, num_layers=3), Trainee(context, vocabulary=128)
    weights = {"finetune": True}
    return {
        "architecture": error_of(lambda: manager(context, root, deeper).load(trainee.state)),
        "tokenizer": error_of(lambda: manager(context, root, ModelIdentity(61, "tokenizer-b")).load(trainee.state)),
        "vocabulary": error_of(lambda: manager(context, root, ModelIdentity(100)).load(wide.state)),
        "layers": error_of(lambda: manager(context, root, unknown, **weights).load(three_layers.state)),
        "left": error_of(lambda: manager(context, root, unknown, **weights).load(_without_output_layer(trainee))),
        "step": error_of(lambda: manager(context, root, ckpt_step=2).load(trainee.state)),
    }


def _without_output_layer(trainee: Trainee) -> Any:
    """Asks for what a model with tied embeddings would ask for."""

    def build(**options: Any) -> dict[str, Any]:
        state = trainee.state(**options)
        del state["model"]["output_layer.weight"]
        return state

    return build


@contextmanager
def _writers_that_wait(ready: Callable[[], bool]) -> Iterator[None]:
    """Background writers that start to write when ``ready`` says so, or after half a minute."""
    before = background.write_outcome

    def write_late(planned: Any) -> Any:
        deadline = time.monotonic() + 30
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.02)
        return before(planned)

    background.write_outcome = write_late
    try:
        yield
    finally:
        background.write_outcome = before


def killed_while_saving(root: str) -> None:
    """Loads the latest and saves the step after it; SIGKILL comes when the shards are written, but nothing else."""
    from megatron_sip.checkpoint import writing

    def die(*unused: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    context = initialize(ParallelConfig(), seed=5)
    trainee, loaded = _resume(context, root)
    writing.finish = die
    manager(context, root).save(loaded.step + 1, trainee.state, COMMON)


def go_on(payload: dict[str, Any]) -> dict[str, Any]:
    """Loads the latest at another layout, trains three steps and saves."""
    context = initialize(ParallelConfig(**payload["sizes"]), seed=99)
    trainee, loaded = _resume(context, payload["root"])
    losses = trainee.train(loaded.step, loaded.step + 3)
    manager(context, payload["root"]).save(loaded.step + 3, trainee.state, COMMON)
    context.barrier()
    return {"step": loaded.step, "losses": losses, "names": sorted(os.listdir(payload["root"]))}


def one_rank(root: str) -> dict[str, Any]:
    """The end of the story on one rank, other ways to load it, and a checkpoint as Megatron-LM writes it."""
    context = initialize(ParallelConfig(), seed=99)
    trainee, loaded = _resume(context, f"{root}/story")
    report: dict[str, Any] = {"step": loaded.step, "losses": trainee.train(loaded.step, loaded.step + 3)}
    fresh = Trainee(context)
    for name, options in {
        "finetune": {"finetune": True},
        "no_optim": {"no_load_optim": True, "no_load_rng": True},
        "ckpt_step": {"ckpt_step": 6},
        "pretrained": {"load": f"{root}/nothing", "pretrained_checkpoint": f"{root}/story"},
    }.items():
        found = manager(context, f"{root}/story", **options).load(fresh.state)
        assert found is not None
        report[name] = (found.step, sorted(found.common), sorted(found.state), found.weights_only)
    report["inspection"] = inspection.describe(Path(root) / "story", step=None)
    report["missing"] = manager(context, f"{root}/nothing").load(fresh.state)
    strict = manager(context, f"{root}/nothing", exit_on_missing_checkpoint=True)
    report["missing_strict"] = error_of(lambda: strict.load(fresh.state))
    wider = Trainee(context, vocabulary=66)
    found = manager(context, f"{root}/story", finetune=True).load(wider.state)
    assert found is not None
    wider.take(found.state)
    trainee, _ = _resume(context, f"{root}/story")
    table, padded = (t.model.embedding.word_embeddings.weight for t in (trainee, wider))
    report["other_padding"] = (list(padded.shape), torch.equal(padded[:61], table[:61]))
    report["reference"] = _reference(context, root)
    report["virtual"] = _weights_by_layer([_load_four_layers(context, f"{root}/virtual").model])
    report["policy"] = _policy(context, f"{root}/virtual")
    report["damaged"] = _damage(context, f"{root}/story", fresh)
    report["megatron_lm"] = _megatron_lm(context, f"{root}/megatron_lm")
    return report


def _reference(context: ParallelContext, root: str) -> dict[str, Any]:
    """A run with a reference loads a checkpoint without one, its own, and the weights of its own."""
    writer = Trainee(context, reference=torch.full((VOCABULARY, 32), 0.5))
    manager(context, f"{root}/reference").save(1, writer.state, COMMON)
    reader = Trainee(context, reference=torch.zeros(VOCABULARY, 32))
    parts = {}
    for name, directory, options in (
        ("absent", "story", {}),
        ("present", "reference", {"no_load_optim": True}),
        ("finetune", "reference", {"finetune": True}),
    ):
        loaded = manager(context, f"{root}/{directory}", **options).load(reader.state)
        assert loaded is not None
        parts[name] = sorted(loaded.state)
        if name == "present":
            parts["value"] = loaded.state["reference"]["table"].unique().tolist()
    return parts


def virtual_stages(root: str) -> dict[str, Any]:
    """Four layers on two pipeline ranks with two virtual stages each, saved as Megatron-LM saves them."""
    sizes = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    context = initialize(ParallelConfig(**sizes), seed=5)
    config = config_of(context, num_layers=4, virtual_stages=2)
    chunks = []
    for stage in range(2):
        ends = (context.is_first_stage and stage == 0, context.is_last_stage and stage == 1)
        chunks.append(model_of(config, VOCABULARY, *ends, virtual_stage=stage))
    state = {f"model{stage}": chunk.sharded_state_dict(metadata=SHARDING) for stage, chunk in enumerate(chunks)}
    _save_like_megatron_lm(
        state, Path(root) / "virtual", step=7, args=Namespace(num_layers=4, normalization="RMSNorm"), context=context
    )
    return _weights_by_layer(chunks)


def _weights_by_layer(chunks: list[Any]) -> dict[str, Any]:
    """Parameters under their names in the whole model."""
    weights = {}
    for chunk in chunks:
        numbers = {str(index): str(layer.layer_number - 1) for index, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = numbers[parts[2]]
            weights[".".join(parts)] = parameter.detach().tolist()
    return weights


def _policy(context: ParallelContext, root: str) -> dict[str, Any]:
    """The package's own model takes the weights that Megatron-Core's GPTModel was saved with."""
    config = ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        make_vocab_size_divisible_by=8,
    )
    (policy,) = build_model(config, 61, context)

    def build(*, is_loading: bool, with_optimizer: bool, metadata: Any) -> dict[str, Any]:
        return {"model": policy.sharded_state_dict(metadata=dict(metadata))}

    identity = identity_of(config.resolve(), 61, "")
    loaded = manager(context, root, identity, finetune=True).load(build)
    assert loaded is not None
    policy.load_state_dict(loaded.state["model"], strict=True)
    return _weights_by_layer([policy])


def _load_four_layers(context: ParallelContext, root: str) -> Trainee:
    trainee = Trainee(context, num_layers=4)
    loaded = manager(context, root, ModelIdentity(61, "", {"num_layers": 4}), finetune=True).load(trainee.state)
    assert loaded is not None
    trainee.take(loaded.state)
    return trainee


def _damage(context: ParallelContext, root: str, fresh: Trainee) -> dict[str, str]:
    """The same number of bytes with other contents: only reading can tell."""
    latest = layout.resolve(Path(root), None)
    assert latest is not None
    messages = {}
    for name in ("common.pt", ".metadata", "__0_0.distcp"):
        path = latest / name
        before = path.read_bytes()
        path.write_bytes(b"\0" * len(before))
        messages[name] = error_of(lambda: manager(context, root).load(fresh.state))
        path.write_bytes(before)
    return messages


def _megatron_lm(context: ParallelContext, root: str) -> dict[str, Any]:
    """Goes on from a checkpoint that this package has not written."""
    trainee = Trainee(context)
    trainee.train(0, 7)
    state = trainee.state(is_loading=False, with_optimizer=True, metadata=SHARDING)
    args = Namespace(num_layers=2, hidden_size=32, num_query_groups=2, group_query_attention=True, padded_vocab_size=64)
    _save_like_megatron_lm(state, Path(root), step=7, args=args, context=context)
    other = ModelIdentity(61, "tokenizer-a", {"num_layers": 2, "hidden_size": 48})
    refused = error_of(lambda: manager(context, root, other).load(trainee.state))
    resumed, loaded = _resume(context, root)
    return {
        "step": loaded.step,
        "run": loaded.common,
        "weights": resumed.weights() == trainee.weights(),
        "losses": resumed.train(7, 10) == trainee.train(7, 10),
        "refused": refused,
    }


def _save_like_megatron_lm(
    state: dict[str, Any], root: Path, step: int, args: Namespace, context: ParallelContext
) -> None:
    """By Megatron-Core alone, with the keys of Megatron-LM's generate_state_dict."""
    state |= {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": step,
        "num_floating_point_operations_so_far": 0,
        "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 8 * step},
        "rng_state": dist_checkpointing.ShardedObject(
            "rng_state", [{"torch_rng_state": torch.get_rng_state()}], (context.pp_size, 1), (context.pp_rank, 0)
        ),
    }
    directory = root / f"iter_{step:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    # 0.19 writes through a package that is not installed, unless it is told not to.
    options = {"async_strategy": "mcore"} if version("megatron-core") >= "0.19" else {}
    dist_checkpointing.save(state, str(directory), content_metadata=dict(SHARDING), **options)
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))
