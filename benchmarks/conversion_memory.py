"""Converts a model of 8B's shape to Megatron and back: peak memory, time, and whether every byte came back.

    benchmarks/conversion_memory.py make FOLDER           bfloat16 in shards of 4 GiB, sparse: little disk
    benchmarks/conversion_memory.py to-megatron FOLDER
    benchmarks/conversion_memory.py to-hf FOLDER
    benchmarks/conversion_memory.py compare FOLDER        checksums of all tensors against those of ``make``

Removes what the next step does not need: at most two of the three copies lie on the disk together (33 GB).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron_sip.huggingface.config_json import CONFIG, config_of
from megatron_sip.huggingface.correspondence import pieces
from megatron_sip.huggingface.safetensors_files import (
    header_of,
    open_model,
    plan_files,
    read_tensor,
    write_index,
)
from megatron_sip.model import PRESETS

TOOL = Path(__file__).resolve().parent.parent / "tools/convert_checkpoint.py"
MODEL, MEGATRON, BACK, SUMS = "model", "megatron", "back", "sums.json"
VOCABULARY = {"llama3.1-8b": 128256, "llama2-1.4b": 32000, "tiny": 512}


def make(folder: Path, preset: str) -> None:
    """Sparse files: every tensor begins with 64 KiB of random numbers, and the rest is zeros that take no disk."""
    architecture, rows = PRESETS[preset], VOCABULARY[preset]
    shapes = {name: shape for piece in pieces(architecture, rows) for name, shape in piece.sources}
    target = folder / MODEL
    target.mkdir(parents=True)
    plan = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    files = plan_files(plan, 4 << 30)
    for name, shard in files.items():
        header = header_of(shard)
        with open(target / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(2 * torch.Size(shape).numel() for _, shape in shard.values()))
    write_index(target, files)
    noise = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = open_model(target)
    for number, tensor in enumerate(stored.values()):
        with open(tensor.path, "r+b") as file:
            file.seek(tensor.start)
            length = min(noise.numel(), torch.Size(tensor.shape).numel())
            file.write(noise.roll(7919 * number)[:length].view(torch.uint8).numpy().data)
    sums = {name: checksum(read_tensor(tensor)) for name, tensor in stored.items()}
    config = config_of(architecture, rows, torch.bfloat16, None, None)
    (target / CONFIG).write_text(json.dumps(config))
    (folder / SUMS).write_text(json.dumps(sums))


def checksum(tensor: torch.Tensor) -> int:
    """Of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def convert(command: str, source: Path, target: Path) -> None:
    """Runs the tool alone in a process, and prints what it took."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(TOOL), command, str(source), str(target)], check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.monotonic() - started
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{command}: {size / 1e9:.2f} GB written, peak memory {peak_gib:.2f} GiB, {seconds:.0f} s")


def compare(folder: Path) -> bool:
    """Whether every tensor came back with its bytes."""
    expected = json.loads((folder / SUMS).read_text())
    found = {name: checksum(read_tensor(stored)) for name, stored in open_model(folder / BACK).items()}
    print(f"{sum(found.get(name) == value for name, value in expected.items())} of {len(expected)} tensors are equal")
    return found == expected


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "to-megatron", "to-hf", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=tuple(VOCABULARY), default="llama3.1-8b")
    options = parser.parse_args()
    folder = options.folder
    if options.step == "make":
        make(folder, options.preset)
    elif options.step == "to-megatron":
        convert("to-megatron", folder / MODEL, folder / MEGATRON)
        shutil.rmtree(folder / MODEL)
    elif options.step == "to-hf":
        convert("to-hf", folder / MEGATRON, folder / BACK)
        shutil.rmtree(folder / MEGATRON)
    else:
        return 0 if compare(folder) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
