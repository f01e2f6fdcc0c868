"""Parts of the manager that need no ranks: identities, the common state, host copies, warnings."""

from __future__ import annotations

import errno
import io
import re
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sip.checkpoint import CheckpointConfig, CheckpointManager, ModelIdentity, identity_of, layout, writing
from megatron_sip.checkpoint.identity import check_identity
from megatron_sip.checkpoint.room import num_bytes, why_unwritten
from megatron_sip.errors import CheckpointError
from megatron_sip.model.presets import PRESETS
from tests.checkpoint.test_layout import make

HERE = Path("somewhere/iter_0000010")


def manager(config: CheckpointConfig) -> CheckpointManager:
    context: Any = SimpleNamespace(rank=0, world_size=1, tp_size=1, pp_size=1, dp_size=1)
    return CheckpointManager(config, context, ModelIdentity(61))


@pytest.mark.parametrize(
    ("error", "free", "written", "message"),
    [
        # 1,000 are needed: 400 written and 600 free are enough, 400 and 599 are not.
        (RuntimeError("[enforce fail] . unexpected pos 704 vs 598"), 599, 400, "the disk is full: 599 bytes are free"),
        (RuntimeError("[enforce fail] . unexpected pos 704 vs 598"), 600, 400, r"704 vs 598 \(a quota or a limit"),
        (OSError(errno.ENOSPC, "No space left on device"), 10**9, 0, "the disk is full: 1,000,000,000 bytes are free"),
        (OSError(errno.EIO, "Input/output error"), 10**9, 0, r"^\[Errno 5\] Input/output error$"),
    ],
)
def test_a_cut_write_is_a_full_disk_where_the_rest_has_no_room(
    error: Exception, free: int, written: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sip.checkpoint.room.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    buckets = [("path", "name", ([(None, io.BytesIO(b"x" * 200))], [(None, torch.zeros(200))]))]
    assert num_bytes(buckets) == 200 + 4 * 200
    assert re.search(message, why_unwritten(error, tmp_path, num_bytes(buckets), written))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm' in it and 'RMSNorm' here"),
        ({"rotary_base": 500000}, "rotary_base is 500000 in it and 10000.0 here"),
        ({"num_attention_heads": 4, "num_query_groups": 1, "group_query_attention": False}, "num_query_groups is 4"),
        ({"swiglu": False, "num_layers": 4}, "swiglu is False in it and True here"),
    ],
)
def test_megatron_lm_checkpoint_of_another_architecture_is_refused(args: dict[str, Any], message: str) -> None:
    identity = identity_of(PRESETS["tiny"], 61, "abc")
    with pytest.raises(CheckpointError, match=message):
        check_identity(HERE, {"args": Namespace(**args)}, identity)


def test_what_megatron_lm_does_not_say_or_rope_leaves_free_is_no_difference() -> None:
    identity = identity_of(PRESETS["llama3.1-8b"], 128256, "abc")
    args = Namespace(num_layers=32, vocab_size=None, max_position_embeddings=8192, rope_scaling_factor=8.0)
    check_identity(HERE, {"args": args}, identity)
    check_identity(HERE, {}, identity)


def test_all_differences_come_in_one_message() -> None:
    common = {"identity": ModelIdentity(50, "b", {"num_layers": 3}).as_plain()}
    with pytest.raises(CheckpointError) as refused:
        check_identity(HERE, common, ModelIdentity(61, "a", {"num_layers": 2}))
    for part in ("num_layers is 3 in it and 2 here", "vocab_size is 50 in it and 61", "tokenizer is 'b' in it and 'a'"):
        assert part in str(refused.value)


def test_state_that_could_not_be_loaded_again_is_refused_by_its_place() -> None:
    checkpoints = manager(CheckpointConfig(save="unused"))
    with pytest.raises(TypeError, match=r"common\['data'\]\[1\] is a ndarray"):
        checkpoints._common(1, {"data": [0, np.arange(3)]})


def test_shared_memory_is_copied_before_a_writer_is_forked_and_other_memory_is_not() -> None:
    shared, own = torch.zeros(4).share_memory_(), torch.zeros(4)
    copies = [writing._host_copy(tensor) for tensor in (shared, own)]
    shared.fill_(1)
    assert copies[0].tolist() == [0, 0, 0, 0]
    assert copies[1].data_ptr() == own.data_ptr()


def test_run_that_would_save_over_another_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 20)
    manager(CheckpointConfig(save=str(tmp_path), load=str(tmp_path)))._warn_of_another_run()
    assert not caplog.messages
    manager(CheckpointConfig(save=str(tmp_path)))._warn_of_another_run()
    assert "already has a checkpoint of step 20" in caplog.text


def test_deletion_that_fails_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        make(tmp_path, step)

    def refuse(path: Path) -> None:
        raise PermissionError(f"not yours: {path}")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    manager(CheckpointConfig(save=str(tmp_path), keep_last=1))._prune(tmp_path, 20)
    assert "earlier checkpoints could not be deleted: not yours" in caplog.text
    assert layout.resolve(tmp_path, None) == tmp_path / "iter_0000020"
