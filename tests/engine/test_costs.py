"""What an optimizer step and a save cost: fused kernels, and host memory that is planned for.

Does not cover CUDA, where tensors are copied to the host in any case.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.rows import VOCAB
from tests.engine.settings import PAYLOAD
from tests.ranks import run_ranks

HIDDEN, FFN, LAYERS, PADDED_VOCABULARY = 32, 48, 4, 64
QUERY_KEY_VALUE = HIDDEN * (HIDDEN + 2 * HIDDEN // 2)  # 4 heads, 2 key-value heads
NUM_PARAMETERS = (
    LAYERS * (QUERY_KEY_VALUE + HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN)
    + HIDDEN
    + 2 * PADDED_VOCABULARY * HIDDEN
)
WRITTEN = 20 * NUM_PARAMETERS
"""Bytes of a float32 checkpoint: weights 4, reference 4, AdamW's weights and moments 12."""


def found(num_ranks: int, tmp_path: Path) -> list[dict[str, Any]]:
    payload = {**PAYLOAD, "directory": str(tmp_path / "save")}
    return run_ranks(num_ranks, "tests.engine.costs:kernels_and_bytes", payload)


def test_steps_run_fused_kernels_and_a_save_copies_what_it_writes_once(tmp_path: Path) -> None:
    assert VOCAB <= PADDED_VOCABULARY
    [one] = found(1, tmp_path)
    assert one["kernels"]["aten::_fused_adamw_"] == one["groups"] == 2  # with and without weight decay
    assert not {"aten::addcdiv_", "aten::_foreach_addcdiv_"} & one["kernels"].keys()
    assert one["held"] == WRITTEN
    assert one["allocated"] <= 1.01 * WRITTEN


def test_replicas_divide_the_host_memory_of_a_save(tmp_path: Path) -> None:
    for rank in found(2, tmp_path):
        assert rank["kernels"]["aten::_fused_adamw_"] == rank["groups"]
        assert rank["held"] <= 0.501 * WRITTEN
        # Half of what is written, and on the way to it the part of the optimizer state that it was gathered from.
        assert rank["allocated"] <= 0.75 * WRITTEN
