"""Directories, manifests and the latest file: what counts as a whole checkpoint, and what survives a kill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sip.checkpoint import layout
from megatron_sip.checkpoint.config import CheckpointConfig
from megatron_sip.errors import CheckpointError, ConfigurationError


def make(root: Path, step: int, *, foreign: bool = False) -> Path:
    """A checkpoint of ``step`` as a save makes it, with stand-ins for Megatron-Core's files."""
    root.mkdir(exist_ok=True)
    partial = layout.partial_directory(root, step, f"t{step}")
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"x" * 100)
    for name in (".metadata", "metadata.json", "common.pt"):
        (partial / name).write_bytes(b"{}")
    if not foreign:
        layout.write_manifest(partial, step, {})
    layout.publish(partial, layout.step_directory(root, step))
    return layout.step_directory(root, step)


def test_directory_is_named_as_megatron_lm_names_it_and_latest_names_the_step(tmp_path: Path) -> None:
    assert make(tmp_path, 20).name == "iter_0000020"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "20"
    assert layout.resolve(tmp_path, None) == tmp_path / "iter_0000020"


def test_partial_directory_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 10)
    partial = layout.partial_directory(tmp_path, 20, "abc")
    partial.mkdir()
    for name in (".metadata", "metadata.json", "common.pt"):
        (partial / name).write_bytes(b"{}")
    assert layout.saved_steps(tmp_path) == [10]
    assert layout.resolve(tmp_path, None) == tmp_path / "iter_0000010"
    layout.remove_leftovers(tmp_path)
    assert not partial.exists() and (tmp_path / "iter_0000010").exists()


def test_kill_between_the_rename_and_the_latest_file_leaves_the_earlier_one_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 10)
    with monkeypatch.context() as patched:
        patched.setattr(layout, "write_durably", _die_at(layout.LATEST, layout.write_durably))
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, 20)
    assert layout.resolve(tmp_path, None) == tmp_path / "iter_0000010"
    assert layout.whole_steps(tmp_path) == [10, 20]


def test_kill_while_latest_is_written_leaves_its_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 10)
    monkeypatch.setattr(os, "fsync", _raise_keyboard_interrupt)
    with pytest.raises(KeyboardInterrupt):
        layout.write_durably(tmp_path / layout.LATEST, "20\n")
    assert layout.read_latest(tmp_path) == 10


def test_same_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    first = make(tmp_path, 10)
    (first / "mark").touch()
    assert not (make(tmp_path, 10) / "mark").exists()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["iter_0000010", layout.LATEST]


def test_truncated_file_is_reported_with_both_sizes_and_the_whole_steps(tmp_path: Path) -> None:
    make(tmp_path, 10)
    shard = make(tmp_path, 20) / "__0_0.distcp"
    os.truncate(shard, 40)
    with pytest.raises(CheckpointError, match=r"has 40 bytes, 100 were written.*--ckpt-step 10"):
        layout.resolve(tmp_path, None)
    assert layout.resolve(tmp_path, 10) == tmp_path / "iter_0000010"


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
def test_missing_file_is_reported_by_name(tmp_path: Path, name: str) -> None:
    (make(tmp_path, 10) / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*no whole checkpoint"):
        layout.resolve(tmp_path, None)


def test_wanted_step_that_was_never_saved_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20)
    with pytest.raises(CheckpointError, match=r"iter_0000015 does not exist: whole checkpoints there: 10, 20"):
        layout.resolve(tmp_path, 15)


def test_latest_file_with_something_else_in_it_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, 10)
    (tmp_path / layout.LATEST).write_text("ten")
    with pytest.raises(CheckpointError, match="'ten', which is no step"):
        layout.resolve(tmp_path, None)


def test_directory_without_any_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert layout.resolve(tmp_path, None) is None
    assert layout.resolve(tmp_path / "absent", None) is None


def test_pruning_keeps_the_newest_and_what_is_not_ours(tmp_path: Path) -> None:
    make(tmp_path, 5, foreign=True)
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    assert layout.prune(tmp_path, newest=30, keep=2) == [10]
    assert layout.saved_steps(tmp_path) == [5, 20, 30, 40]


def test_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    (layout.step_directory(tmp_path, 20) / "common.pt").unlink()
    assert layout.prune(tmp_path, newest=30, keep=2) == []
    assert layout.whole_steps(tmp_path) == [10, 30]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_interval": 0, "save": "d"}, "--save-interval is 0"),
        ({"save_interval": 5}, "--save-interval 5 has nowhere to save to: add --save"),
        ({"ckpt_step": 5}, "--ckpt-step 5 says which step to load: add --load"),
        ({"finetune": True}, "--finetune takes its weights from --load"),
        ({"on_save_failure": "retry"}, "'retry': choose 'stop' or 'continue'"),
        ({"keep_last": -1}, "--keep-last is -1"),
    ],
)
def test_impossible_options_name_value_and_remedy(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CheckpointConfig(**options).validate()  # type: ignore[arg-type]


def _die_at(name: str, act):  # type: ignore[no-untyped-def]
    def write(path: Path, text: str) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        act(path, text)

    return write


def _raise_keyboard_interrupt(descriptor: int) -> None:
    raise KeyboardInterrupt


def test_what_stands_beside_a_checkpoint_goes_along_once_and_whole(tmp_path: Path) -> None:
    """A tokenizer that to-megatron carried; a copy that a kill cut short is made again."""
    folder, root = tmp_path / "start" / "huggingface", tmp_path / "run"
    root.mkdir()
    layout.carry(folder, root)
    assert not list(root.iterdir()), "there was nothing to take along"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (root / "huggingface.partial").mkdir()
    (root / "huggingface.partial" / "half").write_text("{")
    layout.carry(folder, root)
    assert [path.relative_to(root).as_posix() for path in root.rglob("*")] == [
        "huggingface",
        "huggingface/tokenizer.json",
    ]
    (folder / "tokenizer.json").write_text("another")
    layout.carry(folder, root)
    assert (root / "huggingface" / "tokenizer.json").read_text() == "{}"
