"""Conversion between transformers and Megatron. Not covered: models that need a GPU's memory."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_sip.checkpoint.huggingface import to_hugging_face, to_megatron
from megatron_sip.checkpoint.huggingface.verify import Comparison
from megatron_sip.errors import CheckpointError, ConfigurationError, SIPError
from megatron_sip.huggingface.config_json import architecture_of, config_of, recipe_of
from megatron_sip.model import PRESETS, ModelConfig
from tests.interop.claims import ROWS
from tests.interop.models import save_model
from tests.ranks import run_ranks
from tools.convert_checkpoint import main

KINDS = ("llama2", "llama31", "qwen2", "qwen3")
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Four families saved by transformers and converted; the logits that transformers computes, of real tokens."""
    import transformers

    root = tmp_path_factory.mktemp("interop")
    expected = {}
    for kind in KINDS:
        model = save_model(root / kind, kind)
        with torch.no_grad():
            # Rows of the embedding beyond the tokenizer's are padding: never sampled nor scored.
            num_tokens = len(transformers.AutoTokenizer.from_pretrained(root / kind))
            expected[kind] = model(ROWS).logits[..., :num_tokens]
        to_megatron(root / kind, root / f"{kind}-megatron")
    return root, expected


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of a model directory, read by the safetensors library."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def assert_streamed(model: Path, ranks: list[dict[str, Any]], num_tokens: int) -> None:
    """What rollout servers are given: all tensors, whole on each tensor-parallel rank, of real tokens alone."""
    expected = {
        name: tensor[:num_tokens] if tensor.shape[0] == 283 else tensor for name, tensor in tensors(model).items()
    }
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
    found: dict[str, torch.Tensor] = {}
    for rank in ranks:
        assert [(name, value.shape) for name, value in rank["weights"].items()] == rank["planned"]
        for name, value in rank["weights"].items():
            assert torch.equal(torch.from_numpy(value), expected[name]), name
            found[name] = expected[name]
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), LAYOUTS)
def test_converted_models_give_the_logits_of_transformers_at_every_layout(
    models: tuple[Path, dict[str, torch.Tensor]], tensor_parallel: int, pipeline_parallel: int
) -> None:
    root, expected = models
    sizes = {"tensor_model_parallel_size": tensor_parallel, "pipeline_model_parallel_size": pipeline_parallel}
    reports = run_ranks(
        tensor_parallel * pipeline_parallel,
        "tests.interop.claims:converted_models",
        {
            "sizes": sizes,
            "roots": {kind: str(root / f"{kind}-megatron") for kind in KINDS},
            "save": KINDS if (tensor_parallel, pipeline_parallel) == (2, 2) else (),
        },
        timeout_s=240,
    )
    for kind in KINDS:
        theirs = expected[kind]
        following = ROWS.roll(-1, dims=1)[..., None]
        scores = theirs.log_softmax(-1).gather(-1, following).squeeze(-1)
        assert any(report[kind]["logits"] is not None for report in reports)
        for report in reports:
            if report[kind]["logits"] is not None:
                torch.testing.assert_close(torch.from_numpy(report[kind]["logits"]), theirs, rtol=1e-4, atol=1e-4)
            for name in ("log_probs", "scored_alone"):
                torch.testing.assert_close(torch.from_numpy(report[kind][name]), scores, rtol=1e-4, atol=1e-4)
            assert torch.equal(torch.from_numpy(report[kind]["best"]), theirs.argmax(-1))
        assert_streamed(root / kind, [report[kind] for report in reports], num_tokens=theirs.shape[-1])
    if (tensor_parallel, pipeline_parallel) == (2, 2):
        for kind in KINDS:  # written by four ranks, with the vocabulary padded for them
            to_hugging_face(
                root / f"{kind}-megatron/again",
                root / f"{kind}-again",
                like=root / kind,
                vocab_rows=expected[kind].shape[-1],
            )
            ours, theirs = tensors(root / f"{kind}-again"), tensors(root / kind)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert torch.equal(
                    ours[name], tensor[: expected[kind].shape[-1]] if tensor.shape[0] == 283 else tensor
                ), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_bit_exact_and_carries_tokenizer_and_configuration(
    models: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    root, _ = models
    back = root / f"{kind}-back"
    to_hugging_face(root / f"{kind}-megatron", back, max_shard_bytes=50_000)
    assert_same(back, root / kind)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert json.loads((back / "config.json").read_text()) == json.loads((root / kind / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (root / kind / name).read_bytes()


def test_bfloat16_stays_as_it_is_or_becomes_float32(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama31", torch.bfloat16)
    to_megatron(tmp_path / "model", tmp_path / "megatron")
    assert yaml.safe_load((tmp_path / "megatron/recipe.yaml").read_text())["model"]["bf16"] is True
    to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert_same(tmp_path / "back", tmp_path / "model")
    to_hugging_face(tmp_path / "megatron", tmp_path / "wide", dtype="float32")
    wide = tensors(tmp_path / "wide")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in tensors(tmp_path / "model").items())
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"


def test_a_recipe_describes_the_same_architecture_as_the_configuration() -> None:
    for architecture in PRESETS.values():
        assert ModelConfig(**recipe_of(architecture)).resolve() == architecture
        config = config_of(architecture, 100, torch.bfloat16, None, 2)
        assert architecture_of(config, Path("config.json")) == architecture


def test_transformers_reads_the_configuration_of_a_model_of_ours(tmp_path: Path) -> None:
    import transformers

    values = config_of(PRESETS["llama3.1-8b"], 128256, torch.bfloat16, None, 2)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config: Any = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_type"] == "llama3" and config.rope_parameters["rope_theta"] == 500000.0
    assert (config.num_key_value_heads, config.dtype, config.rms_norm_eps) == (8, torch.bfloat16, 1e-5)


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        values = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps(values))

    return edit


def _remove_a_shard(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()


def _cut_a_shard(model: Path) -> None:
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _other_tokenizer(model: Path) -> None:
    _edit("config.json", vocab_size=200)(model)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (_remove_a_shard, "lacks 1 of 2 shards, model-00002-of-00002.safetensors for one"),
    "cut shard": (_cut_a_shard, "ends at"),
    "wrong shapes": (_edit("config.json", intermediate_size=64), r"gate_proj.weight is \[48, 32\] and not \[64, 32\]"),
    "fewer layers": (_edit("config.json", num_hidden_layers=3), r"model.layers.3.* has no place in it"),
    "unknown architecture": (_edit("config.json", model_type="gemma2"), "model_type is 'gemma2'; llama, qwen2, qwen3"),
    "biases": (_edit("config.json", attention_bias=True), "attention_bias is True; only False"),
    "rope": (_edit("config.json", rope_parameters={"rope_type": "yarn"}), "RoPE scaling of type 'yarn'"),
    "vocabulary": (_other_tokenizer, r"embed_tokens.weight is \[283, 32\] and not \[200, 32\]"),
    "no number": (_edit("config.json", hidden_size="wide"), "config.json: a number of it is none .*'wide'"),
    "broken tokenizer": (lambda model: (model / "tokenizer.json").write_text("{") and None, "cannot load it"),
    "no config": (lambda model: (model / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda model: [p.unlink() for p in model.glob("model*")] and None, "has neither"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(
    models: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, damage: str
) -> None:
    shutil.copytree(models[0] / "llama31", tmp_path / "model")
    spoil, message = DAMAGE[damage]
    spoil(tmp_path / "model")
    with pytest.raises(SIPError, match=message) as raised:
        to_megatron(tmp_path / "model", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_text_to_verify_on_that_is_none_is_refused_before_the_conversion(
    models: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x90")
    for name in ("binary", "nothing"):
        command = ["to-megatron", str(models[0] / "llama2"), str(tmp_path / "out"), "--verify", str(tmp_path / name)]
        assert main(command) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--verify {tmp_path / name} is no text in UTF-8" in error
    assert [path.name for path in tmp_path.iterdir()] == ["binary"]


def test_a_tokenizer_larger_than_the_embedding_or_of_another_model_is_refused(
    models: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    save_model(tmp_path / "model", "llama31", vocab_size=250)
    with pytest.raises(CheckpointError, match=r"tokenizer has 27\d tokens and its embedding 250 rows"):
        to_megatron(tmp_path / "model", tmp_path / "out")
    shutil.copytree(models[0] / "llama31", tmp_path / "like")
    path = tmp_path / "like/tokenizer.json"
    path.write_text(path.read_text().replace('"~"', '"~~"', 1))
    with pytest.raises(SIPError, match="another tokenizer"):
        to_hugging_face(models[0] / "llama31-megatron", tmp_path / "out", like=tmp_path / "like")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_and_a_taken_name_leave_what_was_there(
    models: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for act in (
        lambda: to_megatron(models[0] / "llama2", tmp_path / "out"),
        lambda: to_hugging_face(models[0] / "llama2-megatron", tmp_path / "out"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # stands for a full disk
        try:
            with pytest.raises(CheckpointError, match="nothing was written"):
                act()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").touch()
    with pytest.raises(ConfigurationError, match="exists already"):
        to_megatron(models[0] / "llama2", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_a_comparison_reads_as_one_line() -> None:
    assert "largest difference of a logit 2.00e-06" in str(Comparison(10, 4.0, 2e-6, 9))
