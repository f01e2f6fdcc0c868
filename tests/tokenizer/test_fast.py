"""The fast engine gives the ids of the tokenizer's own library, or none."""

from __future__ import annotations

import base64
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

import megatron_sip.tokenizer.fast as fast_module
from megatron_sip.errors import ConfigurationError
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer
from megatron_sip.tokenizer.base import joined
from megatron_sip.tokenizer.fast import FastTokenizer

pytest.importorskip("gigatoken")
LETTERS = list(" \n\r\t/aBéÀ1.'東-_\u0301\U0001f600")


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    drawn = ["".join(rng.choice(LETTERS, int(size))) for size in rng.integers(0, 60, 200)]
    return [*drawn, "the quick </s> <|endoftext|> fox", "over " * 50, ""]


@pytest.fixture(scope="module", params=["tiktoken", "json", "hf", "hf with a begin token"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    folder = tmp_path_factory.mktemp("fast")
    pieces = [bytes([i]) for i in range(256)] + [b"th", b"he", b"the", b" the", b"qu", b"ow", b"er", b"\n\n", b"  "]
    encoded = [base64.b64encode(piece).decode() for piece in pieces]
    ranks = TokenizerConfig("TikTokenizer", str(folder / "a.tiktoken"), tiktoken_num_special_tokens=9)
    if request.param == "tiktoken":
        (folder / "a.tiktoken").write_text("".join(f"{piece} {i}\n" for i, piece in enumerate(encoded)))
        return ranks
    if request.param == "json":
        rows = ", ".join(f'{{"rank": {i}, "token_bytes": "{piece}"}}' for i, piece in enumerate(encoded))
        (folder / "a.json").write_text(f"[{rows}]")
        return replace(ranks, tokenizer_model=str(folder / "a.json"))
    inner = tokenizers.ByteLevelBPETokenizer()
    words = ["the quick brown fox over there", "the fox of the north"] * 20
    inner.train_from_iterator(words, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    if "begin" in request.param:
        inner._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return TokenizerConfig("HuggingFaceTokenizer", str(folder))


def test_ids_are_those_of_the_library(config: TokenizerConfig) -> None:
    library = build_tokenizer(config)
    fast = build_tokenizer(replace(config, tokenizer_engine="gigatoken"))
    assert isinstance(fast, FastTokenizer)
    expected = [library.encode(text) for text in texts()]
    assert [row.tolist() for row in fast.encode_batch(texts())] == expected
    tokens, lengths = fast.encode_packed(texts())
    assert lengths.tolist() == list(map(len, expected))
    assert tokens.tolist() == [token for row in expected for token in row]
    assert fast.encode("the fox") == library.encode("the fox")
    assert fast.fingerprint == library.fingerprint
    assert fast.encode_packed([])[0].tolist() == fast.encode_batch([]) == []


class _Wrong:
    """An engine that is right about every text but one."""

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def encode_batch(self, inputs: Sequence[str], parallel: bool) -> object:
        changed = ["x" if text == "unlucky" else text for text in inputs]
        return self._engine.encode_batch(changed, parallel=parallel)  # type: ignore[attr-defined]


def test_an_engine_that_differs_is_found_when_it_is_built_and_while_it_works(config: TokenizerConfig) -> None:
    fast = build_tokenizer(replace(config, tokenizer_engine="gigatoken"))
    assert isinstance(fast, FastTokenizer)
    wrong = FastTokenizer(fast._library, _Wrong(fast._engine), int(fast._first_id))
    wrong.encode_packed(["the"])
    with pytest.raises(ConfigurationError, match="other ids than the tokenizer's own library for 'unlucky'"):
        wrong.encode_packed(["the", "unlucky"])  # the second batch: its second text
    with pytest.raises(ConfigurationError, match="give --tokenizer-engine library or auto"):
        FastTokenizer(fast._library, fast._engine, int(fast._first_id) + 1)


def test_what_the_engine_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not for SentencePieceTokenizer"):
        TokenizerConfig("SentencePieceTokenizer", "a.model", tokenizer_engine="gigatoken").validate()
    ranks = tmp_path / "a.tiktoken"
    ranks.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    with pytest.raises(ConfigurationError, match="does not know --tiktoken-pattern v1"):
        build_tokenizer(
            TokenizerConfig("TikTokenizer", str(ranks), tiktoken_pattern="v1", tokenizer_engine="gigatoken")
        )


def test_auto_takes_the_engine_where_it_can_and_says_why_not(
    config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = replace(config, tokenizer_engine="auto")
    taken = build_tokenizer(auto)
    assert isinstance(taken, FastTokenizer) and taken.engine.startswith("gigatoken ") and not taken.engine_reason
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    without = build_tokenizer(auto)
    assert type(without) is type(build_tokenizer(config))
    assert without.engine.split()[0] in ("tiktoken", "tokenizers")
    assert "pip install gigatoken" in without.engine_reason
    assert without.fingerprint == taken.fingerprint


def test_auto_leaves_an_engine_that_differs_from_the_start(
    config: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_module, "_PROBES", ("unlucky",))
    encode = FastTokenizer._encode
    monkeypatch.setattr(FastTokenizer, "_encode", lambda self, texts: encode(self, ["x" for _ in texts]))
    found = build_tokenizer(replace(config, tokenizer_engine="auto"))
    assert not isinstance(found, FastTokenizer)
    assert found.engine_reason == "gives other ids than the tokenizer's own library for 'unlucky'"


def test_an_unavailable_engine_is_said_the_same_from_a_worker() -> None:
    error = fast_module.EngineUnavailable("not for it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_ids_are_put_around_packed_documents() -> None:
    tokens, lengths = joined(np.array([1, 2, 3], np.uint16), np.array([2, 0, 1]), (7,), (8, 9))
    assert tokens.tolist() == [7, 1, 2, 8, 9, 7, 8, 9, 7, 3, 8, 9]
    assert lengths.tolist() == [5, 3, 4]
    assert tokens.dtype == np.uint16
