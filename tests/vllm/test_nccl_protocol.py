"""What we tell vLLM's NCCL engine, read by vLLM's own classes, and our chunks beside its own packing. No GPU.

Does not cover NCCL itself.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import base64, json, torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors
from megatron_sip.rollout.vllm.packing import packed
infos = json.loads(input())
init = NCCLWeightTransferInitInfo(**infos["init"])
update = NCCLWeightTransferUpdateInfo(**infos["update"])
torch.manual_seed(0)
tensors = [(name, torch.randn(shape).to(getattr(torch, kind)))
           for name, kind, shape in zip(update.names, update.dtype_names, update.shapes)]
stream, theirs = iter(tensors), []
while (chunk := pack_tensors(stream, lambda item: item[1], 4000)) is not None:
    theirs.append(chunk.packed_tensor)
ours = list(packed((tensor for _, tensor in tensors), 4000))
same = len(ours) == len(theirs) > 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs))
print(json.dumps([init.nccl_unique_id_bytes.hex(), init.rank_offset, init.world_size, init.packed, same]))
"""


def test_vllm_reads_our_invitation_and_cuts_the_stream_as_we_do(vllm_python: str) -> None:
    import torch

    from megatron_sip.rollout.vllm.direct import update_info
    from megatron_sip.rollout.vllm.links import nccl_init_info

    unique_id = bytes(range(128))
    shapes = [(40, 16), (7,), (300, 9), (1, 5), (64, 64), (3, 3)]
    update = update_info([(f"layer.{i}.weight", torch.bfloat16, shape) for i, shape in enumerate(shapes)])
    told = json.dumps({"init": nccl_init_info(unique_id, 3), "update": update})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [vllm_python, "-c", SCRIPT], input=told, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [unique_id.hex(), 1, 3, True, True]
