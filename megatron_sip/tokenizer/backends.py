"""The tokenizer libraries, each behind ``Tokenizer``. A library is imported where its class is built."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer.base import TokenArray, Tokenizer, library_version, vocabulary_fingerprint


def _require_file(path: str, what: str) -> Path:
    found = Path(path)
    if not found.is_file():
        raise DataError(f"--tokenizer-model {path}: no such file; give the path of a {what}")
    return found


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece ``.model`` files; with ``add_bos`` the Llama 2 convention."""

    def __init__(self, model: str, add_bos: bool = False) -> None:
        import sentencepiece

        path = _require_file(model, "SentencePiece .model file")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"--tokenizer-model {path}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise DataError(f"--tokenizer-model {path}: has no </s> to end documents; train it with eos_id >= 0")
        self.engine = library_version("sentencepiece")
        self._add_bos = add_bos
        if add_bos and self._processor.bos_id() < 0:
            raise DataError(f"--tokenizer-model {path}: has no <s>; use --tokenizer-type SentencePieceTokenizer")
        pieces = (self._processor.id_to_piece(i).encode() for i in range(self.vocab_size))
        self.fingerprint = vocabulary_fingerprint(pieces, self.eod_id)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int, add_bos=self._add_bos)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        # One thread: the callers that have many texts run one process per core.
        rows = self._processor.encode(list(texts), out_type=int, add_bos=self._add_bos, num_threads=1)
        return [np.asarray(row, dtype=np.int32) for row in rows]

    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        text: str = self._processor.decode([int(token) for token in tokens])
        return text


class HuggingFaceTokenizer(Tokenizer):
    """Any ``transformers`` tokenizer. Special tokens it adds to a document (such as Llama's begin token) are kept."""

    def __init__(self, model: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigurationError("--tokenizer-type HuggingFaceTokenizer: pip install transformers") from error
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(model, split_special_tokens=True)
        except (OSError, ValueError) as error:
            raise DataError(f"--tokenizer-model {model}: transformers cannot load it ({error})") from error
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"--tokenizer-model {model}: has no eos_token to end documents; set one in its config")
        # The library beneath, without the wrapper that copies every id several times.
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self.engine = library_version("transformers" if self._backend is None else "tokenizers")
        if self._backend is not None:
            self._backend.encode_special_tokens = True
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size = len(self._tokenizer)
        self.eod_id = int(self._tokenizer.eos_token_id)
        pieces = self._tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        self.fingerprint = vocabulary_fingerprint(((piece or "").encode() for piece in pieces), self.eod_id)
        # A closing token (such as T5's) would stand inside the document, before its own end-of-document.
        probe = self._tokenizer("a").input_ids
        self._num_closing = 1 if len(probe) > 1 and probe[-1] == self.eod_id else 0

    def _strip(self, ids: list[int]) -> list[int]:
        return ids[: len(ids) - self._num_closing] if self._num_closing else ids

    def encode(self, text: str) -> list[int]:
        return self._strip(list(self._tokenizer(text, split_special_tokens=True).input_ids))

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        if not texts:
            return []
        if self._backend is not None:
            rows = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]
        else:
            rows = self._tokenizer(list(texts), split_special_tokens=True, return_attention_mask=False).input_ids
        return [np.asarray(self._strip(row), dtype=np.int32) for row in rows]

    @property
    def definition(self) -> str | None:
        """The text of a ``tokenizer.json``; None for a tokenizer written in Python."""
        return None if self._backend is None or self._num_closing else self._backend.to_str()

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """By the model's chat template, if it has one: its control tokens come from the template, never from a text."""
        if not self._tokenizer.chat_template:
            return super().encode_chat(messages)
        marks = [f"\u2042{number}\u2042" for number in range(len(messages))]
        goes_on = messages[-1]["role"] == "assistant"
        frame: str = self._tokenizer.apply_chat_template(
            [{"role": message["role"], "content": mark} for message, mark in zip(messages, marks, strict=True)],
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
        ids: list[int] = []
        for message, mark in zip(messages, marks, strict=True):
            before, found, frame = frame.partition(mark)
            if not found:
                raise DataError(f"the chat template drops messages of the {message['role']}: leave them out of prompts")
            ids += self._encode_frame(before)
            ids += self._tokenizer(message["content"], add_special_tokens=False, split_special_tokens=True).input_ids
        return ids + self._encode_frame(frame)

    def _encode_frame(self, text: str) -> list[int]:
        """Ids of text of the template, in which control tokens are meant."""
        ids = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids)
        if self._backend is not None:
            self._backend.encode_special_tokens = True  # the wrapper has switched it off, and leaves it so
        return ids

    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        ids = [int(token) for token in tokens]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


# Published with the vocabularies that use them (Mistral's tekken; Megatron calls them v1 and v2).
_TIKTOKEN_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_TIKTOKEN_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_TIKTOKEN_EODS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


class TikTokenizer(Tokenizer):
    """tiktoken ranks: Megatron's ``.json`` (special tokens first) or ``.tiktoken`` text (special tokens last)."""

    def __init__(
        self,
        model: str,
        pattern: str = "v2",
        num_special_tokens: int = 1000,
        special_tokens: Sequence[str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigurationError("--tokenizer-type TikTokenizer: pip install tiktoken") from error
        path = _require_file(model, "tiktoken vocabulary (.json or .tiktoken)")
        named = list(special_tokens or _TIKTOKEN_SPECIALS)
        if len(set(named)) != len(named) or len(named) > num_special_tokens:
            raise DataError(f"{len(named)} special tokens must be distinct and fit in {num_special_tokens} ids")
        named += [f"<SPECIAL_{i}>" for i in range(len(named), num_special_tokens)]
        eods = [token for token in _TIKTOKEN_EODS if token in named]
        if not eods:
            raise DataError(f"--tiktoken-special-tokens: none of {', '.join(_TIKTOKEN_EODS)} is there to end documents")
        pieces = _read_ranks(path)
        if vocab_size is not None:
            pieces = pieces[: vocab_size - num_special_tokens]
        specials_first = path.suffix == ".json"
        self.pieces = pieces
        """Bytes of the ids from ``first_rank`` on."""
        self.first_rank = first_rank = num_special_tokens if specials_first else 0
        first_special = 0 if specials_first else len(pieces)
        self._specials = {token: first_special + i for i, token in enumerate(named)}
        self._encoding = tiktoken.Encoding(
            name=path.stem,
            pat_str=_TIKTOKEN_PATTERNS[pattern],
            mergeable_ranks={piece: first_rank + i for i, piece in enumerate(pieces)},
            special_tokens=self._specials,
        )
        self.engine = library_version("tiktoken")
        self.vocab_size = num_special_tokens + len(pieces)
        self.eod_id = self._specials[eods[0]]
        self._special_ids = frozenset(self._specials.values())
        specials = [token.encode() for token in named]
        ordered = specials + pieces if specials_first else pieces + specials
        self.fingerprint = vocabulary_fingerprint(ordered, self.eod_id)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        return [np.asarray(self._encoding.encode_to_numpy(text, disallowed_special=())) for text in texts]

    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        ids = [int(token) for token in tokens]
        return self._encoding.decode([i for i in ids if i not in self._special_ids], errors="replace")


def _read_ranks(path: Path) -> list[bytes]:
    """The pieces of a tiktoken vocabulary in the order of their ranks."""
    try:
        if path.suffix == ".json":
            entries = [
                (entry["rank"], base64.b64decode(entry["token_bytes"])) for entry in json.loads(path.read_text())
            ]
        else:
            lines = (line.split() for line in path.read_bytes().splitlines() if line)
            entries = [(int(rank), base64.b64decode(piece)) for piece, rank in lines]
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise DataError(f"--tokenizer-model {path}: not tiktoken ranks ({error!r})") from error
    if [rank for rank, _ in entries] != list(range(len(entries))):
        raise DataError(f"--tokenizer-model {path}: ranks must go from 0 to {len(entries) - 1} in order")
    return [piece for _, piece in entries]


class NullTokenizer(Tokenizer):
    """Text that is already numbers: ``"12 7 3"``. For tests and speed measurements."""

    def __init__(self, vocab_size: int) -> None:
        self.eod_id = vocab_size
        self.vocab_size = vocab_size + 1
        self.fingerprint = vocabulary_fingerprint([b"null", str(self.vocab_size).encode()], self.eod_id)

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"NullTokenizer: the text must be numbers ({error})") from error
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DataError(f"NullTokenizer: id {max(ids)} or {min(ids)} is outside 0..{self.eod_id}")
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        return " ".join(str(int(token)) for token in tokens)

    def decode_continuation(
        self, context: Sequence[int] | TokenArray, tokens: Sequence[int] | TokenArray, num_context_tokens: int = 8
    ) -> str:
        return self.decode(tokens)
