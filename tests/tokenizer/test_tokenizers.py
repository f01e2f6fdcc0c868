"""Tokenizers against the libraries themselves; fingerprints; text that spells control tokens."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
import transformers
from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x + 1\n\n\n# naïve café 東京 🦊",
    "  two leading blanks, a tab\there and 12345 numbers",
    "a",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def training_lines() -> Iterator[str]:
    text = "the quick brown fox jumps over lazy dog return number def value array shape of and in to a"
    words = text.split()
    for i in range(400):
        yield " ".join(words[(i * k) % len(words)] for k in range(1, 9))


@pytest.fixture(scope="module")
def spm_model(folder: Path) -> str:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_lines(),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # and a blank before each text, as Llama 2's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = folder / "spm.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="module")
def hf_folder(folder: Path) -> str:
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(training_lines(), vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder / "hf")
    return str(folder / "hf")


def ranks() -> list[bytes]:
    return [bytes([i]) for i in range(256)] + [b"th", b"he", b"the", b" the", b"qu", b"ow", b"er"]


@pytest.fixture(scope="module")
def tekken_json(folder: Path) -> str:
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode("utf-8", "replace")}
        for i, piece in enumerate(ranks())
    ]
    path = folder / "vocab.json"
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.mark.parametrize(("kind", "add_bos"), [("SentencePieceTokenizer", False), ("Llama2Tokenizer", True)])
def test_sentencepiece_ids_are_the_librarys(spm_model: str, kind: str, add_bos: bool) -> None:
    ours = build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=spm_model))
    theirs = sentencepiece.SentencePieceProcessor(model_file=spm_model)
    assert (ours.vocab_size, ours.eod_id) == (340, theirs.eos_id())
    for text, batched in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        expected = theirs.encode(text, add_bos=add_bos)
        assert ours.encode(text) == expected == batched.tolist()
        assert ours.decode([*batched, ours.eod_id]) == theirs.decode(expected)


def test_hugging_face_ids_are_those_of_transformers(hf_folder: str) -> None:
    ours = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf_folder))
    theirs = transformers.AutoTokenizer.from_pretrained(hf_folder)
    assert (ours.vocab_size, ours.eod_id) == (len(theirs), theirs.eos_token_id)
    for text, batched in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        expected = theirs(text).input_ids
        assert ours.encode(text) == expected == batched.tolist()
        assert ours.decode([*batched, ours.eod_id]) == text


def test_tiktoken_json_ids_are_those_of_megatron_core(tekken_json: str) -> None:
    size = len(ranks()) + 20
    ours = build_tokenizer(
        TokenizerConfig(
            tokenizer_type="TikTokenizer", tokenizer_model=tekken_json, tiktoken_num_special_tokens=20, vocab_size=size
        )
    )
    theirs = TikTokenTokenizer(tekken_json, num_special_tokens=20, vocab_size=size)
    assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod)
    for text, batched in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert ours.encode(text) == theirs.text_to_ids(text) == batched.tolist()
        assert ours.decode([*batched, ours.eod_id]) == text


def test_tiktoken_text_ranks_come_before_their_special_tokens(folder: Path) -> None:
    path = folder / "llama.tiktoken"
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(ranks())))
    ours = build_tokenizer(
        TokenizerConfig(
            tokenizer_type="TikTokenizer",
            tokenizer_model=str(path),
            tiktoken_num_special_tokens=4,
            tiktoken_special_tokens=("<|begin_of_text|>", "<|end_of_text|>"),
        )
    )
    pattern = tiktoken.Encoding(
        "check",
        pat_str=r"[^\r\n\p{L}\p{N}]?\p{L}+|\s+|.",
        mergeable_ranks={p: i for i, p in enumerate(ranks())},
        special_tokens={},
    )
    assert ours.encode("the the") == pattern.encode("the the") == [258, 259]
    assert (ours.vocab_size, ours.eod_id) == (len(ranks()) + 4, len(ranks()) + 1)


def test_text_never_turns_into_a_control_token(spm_model: str, hf_folder: str, tekken_json: str) -> None:
    for kind, model, word in (
        ("SentencePieceTokenizer", spm_model, "</s>"),
        ("HuggingFaceTokenizer", hf_folder, "<|endoftext|>"),
        ("TikTokenizer", tekken_json, "</s>"),
    ):
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=model))
        ids = tokenizer.encode(f"one {word} two")
        assert tokenizer.eod_id not in ids, kind
        assert tokenizer.eod_id not in tokenizer.encode_batch([f"one {word} two"])[0].tolist(), kind
        assert tokenizer.decode(ids).replace(" ", "") == f"one{word}two", kind


def test_continuations_join_without_a_blank_of_their_own(spm_model: str, hf_folder: str) -> None:
    for kind, model in (
        ("SentencePieceTokenizer", spm_model),
        ("Llama2Tokenizer", spm_model),
        ("HuggingFaceTokenizer", hf_folder),
    ):
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=model))
        for head, rest in (("the qui", "ck brown fox"), ("the quick", " brown fox"), ("the", "\n\n  dog")):
            context, tokens = tokenizer.encode(head), tokenizer.encode_continuation(rest)
            assert tokenizer.decode(context + tokens) == head + rest, kind
            assert tokenizer.decode_continuation(context, tokens) == rest, kind
        assert tokenizer.decode_continuation([], tokenizer.encode("the dog")) == "the dog"


def test_a_fingerprint_names_the_vocabulary_and_not_the_file(spm_model: str, folder: Path, hf_folder: str) -> None:
    copy = folder / "copy.model"
    copy.write_bytes(Path(spm_model).read_bytes())
    prints = [
        build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=model)).fingerprint
        for kind, model in (
            ("SentencePieceTokenizer", spm_model),
            ("SentencePieceTokenizer", str(copy)),
            ("Llama2Tokenizer", spm_model),
            ("HuggingFaceTokenizer", hf_folder),
        )
    ]
    assert prints[0] == prints[1] == prints[2] != prints[3]
    other = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=339))
    assert other.vocab_size == 340
    assert other.fingerprint != prints[0]


def test_null_tokenizer_reads_numbers_and_refuses_what_is_beyond() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=10))
    assert tokenizer.encode("3 1 9") == [3, 1, 9]
    assert tokenizer.decode([3, 1, 9]) == "3 1 9"
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (11, 10)
    with pytest.raises(DataError, match=r"outside 0\.\.10"):
        tokenizer.encode("11")


def test_wrong_models_are_named(folder: Path, spm_model: str) -> None:
    with pytest.raises(ConfigurationError, match="needs --tokenizer-model"):
        build_tokenizer(TokenizerConfig())
    with pytest.raises(DataError, match="no such file"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(folder / "absent.model")))
    broken = folder / "broken.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(broken)))
    with pytest.raises(DataError, match="not tiktoken ranks"):
        build_tokenizer(TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(broken)))
    with pytest.raises(DataError, match=r"--vocab-size 100 .*: .* has 340 tokens; give --vocab-size 340 "):
        build_tokenizer(TokenizerConfig(tokenizer_model=spm_model, vocab_size=100))
    with pytest.raises(DataError, match="transformers cannot load it"):
        build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder)))


def test_a_chat_format_frames_texts_that_cannot_break_out_of_it(hf_folder: str, folder: Path) -> None:
    fast = transformers.AutoTokenizer.from_pretrained(hf_folder)
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if not (loop.last and continue_final_message) %}<|endoftext|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder / "chat")
    ours = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "chat")))

    def encode(text: str) -> list[int]:
        return list(fast(text, split_special_tokens=True, add_special_tokens=False).input_ids)

    evil = "the <|endoftext|> fox"
    ids = ours.encode_chat([{"role": "user", "content": evil}])
    assert ids == [*encode("user: "), *encode(evil), ours.eod_id, *encode("assistant: ")]
    assert ours.eod_id not in ours.encode_batch([evil])[0], "a later text has become a control token"
    ids = ours.encode_chat([{"role": "user", "content": "the"}, {"role": "assistant", "content": "quick"}])
    assert ids == [*encode("user: "), *encode("the"), ours.eod_id, *encode("assistant: "), *encode("quick")]


def test_without_a_chat_format_messages_stand_one_below_the_other(hf_folder: str, spm_model: str) -> None:
    messages = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "the dog"}]
    for kind, model in (("HuggingFaceTokenizer", hf_folder), ("SentencePieceTokenizer", spm_model)):
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=model))
        assert tokenizer.encode_chat(messages) == tokenizer.encode("the fox\nthe dog"), kind
