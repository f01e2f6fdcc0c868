#!/usr/bin/env python
"""tools/preprocess_data.py beside Megatron-LM's approach, Megatron-LM's own code and datatrove, in CPU time per MB.

One process does all of a contender's work, that of its workers and of its writer, with the pickles that go between
them: CPU time, which a busy machine does not distort as it does wall time, and whose inverse is MB/s per core.
Contenders take turns, in --repeats rounds after one that is not counted; those that write Megatron's files must write
the same bytes. ``--replay`` gives both a tokenizer that knows the ids beforehand: everything but the tokenizer's own
call. The approach: per line ``json.loads``, a list of ids back from the worker, one builder that takes them one by one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.encode import EncodedBatch, LineEncoder
from megatron_sip.data.indexed import CorpusMeta, IndexedWriter
from megatron_sip.data.jsonl import read_lines
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron_sip.tokenizer.base import TokenArray

LINES_PER_TASK = 32
"""Of Megatron-LM's pool."""
Encode = Callable[[str], tuple[dict[str, list[int]], dict[str, list[int]], int]]


class Replay(Tokenizer):
    """Knows the ids of every text beforehand: a tokenizer whose own call costs a look-up."""

    def __init__(self, library: Tokenizer, texts: Sequence[str]) -> None:
        self.vocab_size, self.eod_id, self.fingerprint = library.vocab_size, library.eod_id, library.fingerprint
        tokens, lengths = library.encode_packed(texts)
        self._rows = dict(zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True))
        self._lists = {text: row.tolist() for text, row in self._rows.items()}

    def encode(self, text: str) -> list[int]:
        return self._lists[text].copy()

    def encode_packed(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        rows = [self._rows[text] for text in texts]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        raise TypeError("ids are replayed, text is not")


def texts_of(path: Path) -> list[str]:
    """All texts of a jsonl file."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def parse_tokenizer(text: str) -> TokenizerConfig:
    """What ``--tokenizer`` names."""
    return TokenizerConfig(**json.loads(text))


def alone(texts: Sequence[str], tokenizer: Tokenizer, prefix: str) -> None:
    """The tokenizer's own call on texts that are in memory, by its fastest way."""
    for start in range(0, len(texts), 256):
        tokenizer.encode_packed(texts[start : start + 256])


def approach_encode(tokenizer: Tokenizer, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
    """A line of the approach."""
    ids = tokenizer.encode(json.loads(line)["text"])
    if ids:
        ids.append(tokenizer.eod_id)
    return {"text": ids}, {"text": [len(ids)]}, len(line)


def approach(path: Path, encode: Encode, vocab_size: int, prefix: str) -> None:
    """What Megatron-LM's tools/preprocess_data.py does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=DType.optimal_dtype(vocab_size))
    with open(path, encoding="utf-8") as stream:
        for lines in chunks(stream):
            sent = pickle.loads(pickle.dumps(lines))
            for ids, lengths, _ in pickle.loads(pickle.dumps([encode(line) for line in sent])):
                builder.add_document(ids["text"], lengths["text"])
    builder.finalize(f"{prefix}_text_document.idx")


def chunks(stream: Iterator[str]) -> Iterator[list[str]]:
    """Lines as a pool hands them out."""
    chunk: list[str] = []
    for line in stream:
        chunk.append(line)
        if len(chunk) == LINES_PER_TASK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def ours(path: Path, tokenizer: Tokenizer, prefix: str) -> None:
    """What tools/preprocess_data.py --output-prefix does."""
    encoder = LineEncoder(tokenizer, ("text",), True)
    with IndexedWriter(f"{prefix}_text_document", tokenizer.vocab_size) as writer:
        for batch in read_lines(path):
            sent = pickle.loads(pickle.dumps(batch))
            back: EncodedBatch = pickle.loads(pickle.dumps(encoder(sent)))
            writer.add_documents(back.columns[0].tokens, back.columns[0].lengths)
        counts = writer.num_documents, writer.num_tokens
        writer.close(CorpusMeta(tokenizer.fingerprint, "", tokenizer.vocab_size, tokenizer.eod_id, True, *counts))


def megatron_encode(checkout: Path, config: TokenizerConfig, folder: str) -> Encode:
    """The ``Encoder`` of a checkout's own tools/preprocess_data.py, with its own tokenizer classes."""
    sys.path.insert(0, str(checkout))
    specification = importlib.util.spec_from_file_location("theirs", checkout / "tools" / "preprocess_data.py")
    assert specification is not None and specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    names = ("tokenizer_type", "tokenizer_model", "vocab_size", "tiktoken_num_special_tokens")
    flags = [(f"--{name.replace('_', '-')}", getattr(config, name)) for name in names]
    words = [str(word) for flag, value in flags if value is not None for word in (flag, value)]
    sys.argv = ["theirs", "--input", "-", "--output-prefix", folder, "--workers", "1", "--append-eod", *words]
    encoder = tool.Encoder(tool.get_args())
    encoder.initializer()
    encode: Encode = encoder.encode
    return encode


def datatrove(folder: Path, config: TokenizerConfig, prefix: str) -> None:
    """Its JsonlReader and DocumentTokenizer in one task, without shuffling."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    definition = str(Path(config.tokenizer_model or "") / "tokenizer.json")
    output = tempfile.mkdtemp(dir=Path(prefix).parent)
    tokens = DocumentTokenizer(output, tokenizer_name_or_path=definition, eos_token="</s>", shuffle_documents=False)
    LocalPipelineExecutor([JsonlReader(str(folder)), tokens], tasks=1, workers=1, logging_dir=f"{output}/log").run()


def contenders(options: argparse.Namespace, folder: Path, path: Path) -> dict[str, Callable[[str], None]]:
    """Name -> action that is given the prefix to write to."""
    config = parse_tokenizer(options.tokenizer)
    library, texts = build_tokenizer(config), texts_of(path)
    if options.replay:
        library = Replay(library, texts)
    found: dict[str, Callable[[str], None]] = {
        "tokenizer alone": partial(alone, texts, library),
        "approach": partial(approach, path, partial(approach_encode, library), library.vocab_size),
        "ours": partial(ours, path, library),
    }
    if options.fast:
        fast = build_tokenizer(replace(config, tokenizer_engine="gigatoken"))
        found["gigatoken alone"] = partial(alone, texts, fast)
        found["ours, gigatoken"] = partial(ours, path, fast)
    if options.datatrove:
        found["datatrove"] = partial(datatrove, path.parent, config)
    if options.megatron_lm is not None:
        encode = megatron_encode(options.megatron_lm, config, str(folder))
        found["Megatron-LM"] = partial(approach, path, encode, library.vocab_size)
    return found


def main() -> None:
    """Measure in turn, compare files, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a jsonl file with a text field")
    parser.add_argument("--tokenizer", required=True, help='as JSON: {"tokenizer_type": ..., "tokenizer_model": ...}')
    parser.add_argument("--megabytes", type=float, default=1000.0, help="of the input at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--replay", action="store_true", help="everything but the tokenizer's own call")
    parser.add_argument("--fast", action="store_true", help="with --tokenizer-engine gigatoken too")
    parser.add_argument("--datatrove", action="store_true", help="if installed; Hugging Face tokenizers")
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM that runs in this environment")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        path = folder / "in" / "part.jsonl"
        content = options.input.read_bytes()[: int(options.megabytes * 1e6)]
        path.write_bytes(content[: content.rindex(b"\n") + 1])
        actions = contenders(options, folder, path)
        mb = path.stat().st_size / 1e6
        seconds: dict[str, list[float]] = {contender: [] for contender in actions}
        for number in range(options.repeats + 1):
            written = set()
            for contender, action in actions.items():
                started = time.process_time()
                action(str(folder / "out"))
                if number:
                    seconds[contender].append(time.process_time() - started)
                files = sorted(folder.glob("out_text_document.[bi]*"))
                if files:
                    written.add(tuple(file.read_bytes() for file in files))
                    for file in folder.glob("out_*"):
                        file.unlink()
            if len(written) != 1:
                sys.exit("contenders write different .bin or .idx")
        report(seconds, mb)


def report(seconds: dict[str, list[float]], mb: float) -> None:
    """Medians, and ratios to the approach within rounds."""
    print(f"{mb:.1f} MB, {len(seconds['approach'])} rounds; .bin and .idx equal")
    print("| | CPU ms/MB | MB/s per core | times the approach (least to most) |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratios = [theirs / own for theirs, own in zip(seconds["approach"], found, strict=True)]
        median = statistics.median(found)
        print(
            f"| {name} | {1000 * median / mb:.1f} | {mb / median:.1f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
