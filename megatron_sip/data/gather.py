"""A real corpus without a download: documentation of the Python packages on this machine, split by document."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from megatron_sip.data.docstrings import Deduplicator, docstring_groups, without_prompts
from megatron_sip.data.splits import split_of
from megatron_sip.data.workers import WorkerLost, WorkerPool
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.files import make_folder, write_text

STANDARD_LIBRARY = "stdlib"
DEFAULT_PACKAGES = (
    STANDARD_LIBRARY, "torch", "numpy", "sympy", "networkx", "mpmath", "megatron", "huggingface_hub", "setuptools",
    "tensorboard", "werkzeug", "grpc", "google", "PIL", "absl", "fsspec", "jinja2", "markdown", "packaging", "psutil",
    "requests", "urllib3", "filelock", "yaml", "safetensors", "tokenizers", "tiktoken", "sentencepiece", "zstandard",
)  # fmt: skip
"""What requirements.txt installs, so that the corpus does not depend on what else is there."""
DEFAULT_SPLITS = {"policy": 0.50, "judge": 0.20, "judge2": 0.20, "validation": 0.05, "test": 0.05}
_SKIPPED_FOLDERS = {"__pycache__", "tests", "test", "testing", "site-packages", "dist-packages", "_vendor", "_inductor"}
_SKIPPED_FOLDERS |= {"idlelib", "lib2to3", "turtledemo", "node_modules", "ensurepip", "third_party"}
_TEXT_SUFFIXES = (".txt", ".rst", ".md")
_PIECE_CHARS = 20_000
_FILES_PER_TASK = 64


@dataclass
class SourceCount:
    """What one package gave."""

    version: str = ""
    license: str = ""
    num_files: int = 0
    num_documents: int = 0
    num_chars: int = 0


@dataclass
class GatherReport:
    """What was found, written and left out."""

    documents: dict[str, int] = field(default_factory=dict)
    """Documents per split."""
    num_bytes: dict[str, int] = field(default_factory=dict)
    """UTF-8 bytes of text per split."""
    sources: dict[str, SourceCount] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Packages of which no Python file was found."""
    num_removed_chars: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(self.num_bytes.values())


@dataclass(frozen=True)
class _Source:
    package: str
    name: str
    path: Path


@dataclass(frozen=True)
class _Piece:
    """A document before its number."""

    package: str
    name: str
    text: str


def find_sources(packages: Sequence[str]) -> list[_Source]:
    """Python files of the packages, in an order that depends on names only. Packages not installed are left out."""
    found = []
    for package in packages:
        if package == STANDARD_LIBRARY:
            roots = [Path(sysconfig.get_paths()["stdlib"])]
        else:
            roots = [Path(entry) / package for entry in dict.fromkeys(sys.path) if entry]
        for root in roots:
            if root.is_dir():
                found += [_Source(package, f"{package}/{path.relative_to(root)}", path) for path in _python_files(root)]
                break
    return found


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def _start_reader(keep_prompts: bool) -> Callable[[Sequence[_Source]], list[list[str] | str]]:
    return lambda sources: [_read_source(source, keep_prompts) for source in sources]


def _read_source(source: _Source, keep_prompts: bool) -> list[str] | str:
    """Texts of a file, or why it cannot be read."""
    try:
        groups = docstring_groups(source.path)
    except (SyntaxError, ValueError, RecursionError, OSError) as error:
        return f"{source.name}: {type(error).__name__}: {error}"
    return groups if keep_prompts else [text for text in map(without_prompts, groups) if text.strip()]


def _text_files(folder: Path) -> Iterator[_Piece]:
    """Prose files of a folder in pieces of some pages, cut between paragraphs. Raises ``DataError`` if not UTF-8."""
    for path in sorted(path for path in folder.rglob("*") if path.name.endswith(_TEXT_SUFFIXES)):
        try:
            paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it, for instance with iconv") from error
        piece: list[str] = []
        number = 0
        for paragraph in [*paragraphs, ""]:
            if piece and sum(map(len, piece)) + len(paragraph) > _PIECE_CHARS:
                yield _Piece(folder.name, f"{path.relative_to(folder)}:{number}", "\n\n".join(piece))
                piece, number = [], number + 1
            piece.append(paragraph)
        yield _Piece(folder.name, f"{path.relative_to(folder)}:{number}", "\n\n".join(piece))


def _join_short(pieces: Iterable[_Piece], min_chars: int) -> Iterator[_Piece]:
    """Neighbours of one package joined into documents of ``min_chars`` or more; the rest of a package may be less."""
    waiting: list[_Piece] = []

    def joined(parts: Sequence[_Piece]) -> _Piece:
        return _Piece(parts[0].package, parts[0].name, "\n\n".join(part.text for part in parts))

    for piece in pieces:
        if waiting and waiting[0].package != piece.package:
            yield joined(waiting)
            waiting = []
        waiting.append(piece)
        if sum(len(part.text) for part in waiting) >= min_chars:
            yield joined(waiting)
            waiting = []
    if waiting:
        yield joined(waiting)


def gather(
    output_dir: Path,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    shares: Mapping[str, float] = DEFAULT_SPLITS,
    text_dirs: Sequence[Path] = (),
    min_chars: int = 1500,
    keep_prompts: bool = False,
    workers: int | None = None,
) -> GatherReport:
    """Write ``<split>.jsonl`` (``{"text", "id", "source"}``) and ``sources.json``; return what was found.

    A document's split follows from the file it begins in, and a paragraph is kept only where it comes first, so that
    splits share neither documents nor paragraphs. The same packages give the same files, byte for byte.
    """
    if workers is not None and workers < 1:
        raise ConfigurationError(f"--workers {workers}: must be at least 1")
    for folder in text_dirs:
        if not folder.is_dir():
            raise ConfigurationError(f"--text-dir {folder}: no such folder")
    make_folder(output_dir)  # first: gathering takes a while
    sources = find_sources(packages)
    report = GatherReport()
    report.missing = [name for name in packages if all(source.package != name for source in sources)]
    tasks = (sources[start : start + _FILES_PER_TASK] for start in range(0, len(sources), _FILES_PER_TASK))
    pool: WorkerPool[Sequence[_Source], list[list[str] | str]]
    try:
        with WorkerPool(workers or len(os.sched_getaffinity(0)), _start_reader, keep_prompts) as pool:
            pieces = list(_pieces(sources, chain.from_iterable(pool.map(tasks)), report))
    except WorkerLost as lost:
        raise DataError(f"{lost}; nothing was written: run again") from None
    for folder in text_dirs:
        pieces += _text_files(folder)
    dedupe = Deduplicator()
    cleaned = (_Piece(piece.package, piece.name, dedupe(piece.text)) for piece in pieces)
    documents = list(_join_short((piece for piece in cleaned if piece.text), min_chars))
    report.num_removed_chars = dedupe.num_removed_chars
    _write(output_dir, documents, shares, report)
    return report


def _pieces(sources: Sequence[_Source], texts: Iterable[list[str] | str], report: GatherReport) -> Iterator[_Piece]:
    owners = importlib.metadata.packages_distributions()
    for package in dict.fromkeys(source.package for source in sources):
        report.sources[package] = _distribution(package, owners)
    for source, found in zip(sources, texts, strict=True):
        if isinstance(found, str):
            report.unreadable.append(found)
            continue
        report.sources[source.package].num_files += 1
        yield from (_Piece(source.package, source.name, text) for text in found)


def _distribution(package: str, owners: Mapping[str, Sequence[str]]) -> SourceCount:
    if package == STANDARD_LIBRARY:
        return SourceCount(".".join(map(str, sys.version_info[:3])), "PSF-2.0")
    for name in owners.get(package, ()):
        metadata = importlib.metadata.metadata(name)
        named = [metadata[name] for name in ("License-Expression", "License") if name in metadata]
        terms = next((value for value in named if value.strip()), "see its metadata")
        return SourceCount(importlib.metadata.version(name), terms.splitlines()[0][:80])
    return SourceCount()


def _write(output_dir: Path, documents: Sequence[_Piece], shares: Mapping[str, float], report: GatherReport) -> None:
    lines: dict[str, list[tuple[str, str]]] = {name: [] for name in shares}
    numbers: dict[str, int] = {}
    for piece in documents:
        number = numbers[piece.name] = numbers.get(piece.name, -1) + 1
        identity = f"{piece.name}#{number}"
        split = split_of(piece.name, shares)
        # In the order of a hash: documents of one package do not stand in a row.
        order = hashlib.sha256(identity.encode()).hexdigest()
        row = {"text": piece.text, "id": identity, "source": piece.package}
        lines[split].append((order, json.dumps(row, ensure_ascii=False)))
        count = report.sources.setdefault(piece.package, SourceCount())
        count.num_documents += 1
        count.num_chars += len(piece.text)
        report.documents[split] = report.documents.get(split, 0) + 1
        report.num_bytes[split] = report.num_bytes.get(split, 0) + len(piece.text.encode())
    for split, rows in lines.items():
        if not rows:
            absent = f" (packages not installed: {', '.join(report.missing)})" if report.missing else ""
            raise DataError(
                f"split {split!r} got no document of {len(documents)}{absent}; gather more text or raise its share"
            )
    for split, rows in lines.items():
        write_text(output_dir / f"{split}.jsonl", "".join(line + "\n" for _, line in sorted(rows)))
    listing = {name: vars(count) for name, count in sorted(report.sources.items())}
    write_text(output_dir / "sources.json", json.dumps(listing, indent=1) + "\n")
