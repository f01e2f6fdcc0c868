#!/usr/bin/env python
"""Fetch prose from Debian packages and write it as text files, for tools/gather_corpus.py --text-dir.

Needs a Debian or Ubuntu machine with apt; nothing is installed, and no root rights are needed. Each package keeps its
own licence: see PACKAGES and the copyright file that is written beside the text.
"""

from __future__ import annotations

import gzip
import html
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.errors import DataError
from tools._exit import one_line
from tools._help import HelpFormatter, Parser


def _janeaustenr_novels(root: Path) -> Iterator[tuple[str, str]]:
    """The novels in R's lazy-load database: objects one after the other, each its length and a zlib stream."""
    for path in sorted(root.rglob("Rdata.rdb")):
        rest = path.read_bytes()
        while len(rest) > 4:
            stream = zlib.decompressobj()
            lines = list(_serialized_strings(stream.decompress(rest[4:])))
            rest = stream.unused_data
            if len(lines) > 1000:  # the other objects are small tables
                title = next(line for line in lines if line)
                yield title.title().replace(" ", "_"), "\n".join(lines)


def _serialized_strings(data: bytes) -> Iterator[str]:
    """Strings of a serialized R object: flags of type 9 (ASCII or UTF-8), length, bytes; all numbers big-endian."""
    for found in re.finditer(rb"\x00(?:\x04\x00|\x00\x80)\x09(....)", data, re.DOTALL):
        length = int.from_bytes(found[1], "big")
        if length < 10_000:
            yield data[found.end() : found.end() + length].decode("utf-8", "replace")


def _plain(root: Path) -> Iterator[tuple[str, str]]:
    """Text files, compressed or not."""
    for path in sorted(root.rglob("*")):
        name = path.name.removesuffix(".gz")
        if path.is_file() and name.endswith((".txt", ".rst", ".text")) and name != "copyright":
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", "replace")
            yield "_".join(path.relative_to(root).with_name(name).parts[-3:]), html.unescape(text)


PACKAGES: dict[str, tuple[str, Callable[[Path], Iterator[tuple[str, str]]]]] = {
    "jargon-text": ("The Jargon File, public domain, 1.6 MB", _plain),
    "python3.11-doc": ("Python's manual as reStructuredText, PSF licence, 11 MB", _plain),
    "r-cran-janeaustenr": ("six novels, public domain, 4 MB", _janeaustenr_novels),
}


def fetch(package: str, output_dir: Path) -> int:
    """Download, unpack and extract one package; return the bytes of text written. Raises ``DataError``."""
    extract = PACKAGES[package][1]
    with tempfile.TemporaryDirectory() as scratch:
        _run(["apt-get", "download", package], Path(scratch))
        archive = next(Path(scratch).glob("*.deb"))
        _run(["dpkg", "-x", str(archive), "tree"], Path(scratch))
        root = Path(scratch) / "tree"
        folder = output_dir / package
        folder.mkdir(parents=True, exist_ok=True)
        num_bytes = 0
        for name, text in extract(root):
            num_bytes += (folder / f"{name.removesuffix('.txt')}.txt").write_text(text, encoding="utf-8")
        for notice in root.glob("usr/share/doc/*/copyright"):
            shutil.copyfile(notice, folder / "copyright")
    if not num_bytes:
        raise DataError(f"{package}: no text found in it; its layout has changed, leave it out with --packages")
    return num_bytes


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is not installed: this tool needs Debian or Ubuntu")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}; try apt-get update first")


def main() -> None:
    """Fetch the packages named and say what each gave."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for <package>/*.txt")
    listing = "; ".join(f"{name}: {about}" for name, (about, _) in PACKAGES.items())
    parser.add_argument("--packages", nargs="+", choices=list(PACKAGES), default=list(PACKAGES), help=listing)
    options = parser.parse_args()
    with one_line("fetch_debian_prose"):
        for package in options.packages:
            print(f"{package}: {fetch(package, options.output_dir) / 1e6:.1f} MB of text", flush=True)


if __name__ == "__main__":
    main()
