"""The generic machinery: flags, YAML, precedence, messages. The program's own options are in test_train_config.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_sip.config import from_mapping, load, load_with_sources, option, to_yaml
from megatron_sip.errors import ConfigurationError


class Fruit(str, Enum):
    APPLE = "apple"
    PEAR = "pear"


@dataclass(frozen=True)
class Phase:
    start: int = option(help="first step")
    mix: dict[str, float] = option(default_factory=dict, help="weights")
    kind: str = option("ntp", choices=("ntp", "sip"), help="kind")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule.

    More that --help does not show.
    """

    lr: float = option(1e-3, help="peak learning rate")
    adam_betas: tuple[float, float] = option((0.9, 0.95), help="decay of the moments")
    lr_decay_style: str = option("cosine", choices=("cosine", "linear", "constant"), help="shape of the decay")
    clip_grad: float | None = option(1.0, help="largest gradient norm")
    no_load_optim: bool = option(False, help="do not restore the optimizer")
    bf16: bool = option(False, help="train in bfloat16")
    overlap: bool = option(True, help="overlap communication (100 %)")

    def validate(self) -> None:
        if self.lr <= 0:
            raise ConfigurationError(f"--lr is {self.lr}: must be positive")


@dataclass(frozen=True)
class DataConfig:
    """Corpora."""

    data_path: tuple[str, ...] = option((), help="corpora")
    sizes: list[int] = option(default_factory=list, help="sizes")
    source_weights: dict[str, float] = option(default_factory=dict, help="weight per source")
    phases: tuple[Phase, ...] = option((), help="phases")
    stages: tuple[Mapping[str, Any], ...] = option((), help="stages")
    fruit: Fruit = option(Fruit.APPLE, help="fruit")
    level: Literal[1, 2, "max"] = option(1, help="level")
    cache: Path | None = option(None, help="cache folder")
    name: str = option("", help="name")
    train_iters: int = option(10, help="steps")


@dataclass(frozen=True)
class Root:
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def validate(self) -> None:
        if self.data.train_iters == 13 and self.optimizer.bf16:
            raise ConfigurationError("13 and bf16 do not go together")


@dataclass(frozen=True)
class Required:
    """For tools: options in the root itself."""

    input: str = option(help="the input file")
    workers: int = option(1, help="processes")


def message(argv: list[str], root: type = Root) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(root, argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_flags_fill_every_kind_of_field() -> None:
    argv = (
        "--lr 5e-4 --adam-betas 0.8,0.9 --bf16 --no-overlap --clip-grad none --data-path 0.3 a 0.7 b,c --sizes 1 2,3 "
        "--source-weights x=0.5 y=2 --fruit pear --level max --cache some/where --train-iters 1e3 --no-load-optim"
    )
    config = load(Root, argv.split())
    assert config.optimizer == OptimizerConfig(5e-4, (0.8, 0.9), "cosine", None, True, True, False)
    assert config.data.data_path == ("0.3", "a", "0.7", "b,c")
    assert config.data.sizes == [1, 2, 3]
    assert config.data.source_weights == {"x": 0.5, "y": 2.0}
    assert config.data.fruit is Fruit.PEAR
    assert config.data.level == "max"
    assert config.data.cache == Path("some/where")
    assert config.data.train_iters == 1000 and isinstance(config.data.train_iters, int)


def test_lists_of_mappings_are_inline_yaml_on_the_command_line(tmp_path: Path) -> None:
    argv = ["--phases", "{start: 1}", "{start: 5, mix: {ntp: 0.5}}", "--stages", "{name: warm-up, ntp: 1, ramp: null}"]
    data = load(Root, argv).data
    assert data.phases == (Phase(1), Phase(5, {"ntp": 0.5}))
    assert data.stages == ({"name": "warm-up", "ntp": 1, "ramp": None},)
    assert load(Root, ["--config", recipe(tmp_path, "stages: [{name: 3}, {ntp: [1, 2]}]")]).data.stages == (
        {"name": 3}, {"ntp": [1, 2]}
    )  # fmt: skip


def test_yaml_takes_sections_flat_keys_and_dashes(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, "optimizer:\n  lr: 5e-4\n  clip_grad: null\ntrain-iters: 7\nlevel: 2\ndata:\n  data_path: one\n"
    )
    config = load(Root, ["--config", path])
    assert config.optimizer.lr == 0.0005 and isinstance(config.optimizer.lr, float)
    assert config.optimizer.clip_grad is None
    assert (config.data.train_iters, config.data.level, config.data.data_path) == (7, 2, ("one",))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("3", 3.0),
        (".5", 0.5),
        ("1_000", 1000.0),
    ],
)
def test_numbers_of_yaml_are_numbers(text: str, value: float, tmp_path: Path) -> None:
    path = recipe(tmp_path, f"source_weights: {{x: {text}}}")
    assert load(Root, ["--config", path]).data.source_weights == {"x": value}


@pytest.mark.parametrize("text", ["on", "no", "12:30", "2026-11-21", "1e", "0o7", "e5"])
def test_words_of_yaml_are_not_taken_for_something_else(text: str, tmp_path: Path) -> None:
    assert load(Root, ["--config", recipe(tmp_path, f"name: {text}")]).data.name == text


def test_flags_win_over_yaml_and_a_later_recipe_over_an_earlier_one(tmp_path: Path) -> None:
    first = recipe(tmp_path, "lr: 1\ntrain_iters: 5\nbf16: true\nname: first")
    second = tmp_path / "second.yaml"
    second.write_text("train_iters: 6\nname: second\n")
    argv = ["--name", "flag", "--config", first, "--config", str(second), "--no-bf16"]
    loaded = load_with_sources(Root, argv)
    assert (loaded.config.optimizer.lr, loaded.config.data.train_iters, loaded.config.data.name) == (1.0, 6, "flag")
    assert loaded.config.optimizer.bf16 is False
    assert loaded.sources == {
        "lr": "recipe.yaml", "train_iters": "second.yaml", "bf16": "flag", "name": "flag"
    }  # fmt: skip


def test_a_recipe_stands_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "bottom.yaml").write_text("name: bottom\nlr: 1\ntrain_iters: 5")
    (tmp_path / "middle.yaml").write_text("base: bottom.yaml\nname: middle\nlr: 2")
    (tmp_path / "deep" / "top.yaml").write_text("base: ../middle.yaml\nname: top")
    loaded = load_with_sources(Root, ["--config", str(tmp_path / "deep" / "top.yaml")])
    assert (loaded.config.data.name, loaded.config.optimizer.lr, loaded.config.data.train_iters) == ("top", 2.0, 5)
    assert loaded.sources == {"name": "top.yaml", "lr": "middle.yaml", "train_iters": "bottom.yaml"}
    (tmp_path / "bottom.yaml").write_text("base: middle.yaml")
    assert "its own base" in message(["--config", str(tmp_path / "middle.yaml")])
    (tmp_path / "bottom.yaml").write_text("base: none.yaml")
    assert "none.yaml: cannot read it" in message(["--config", str(tmp_path / "bottom.yaml")])
    (tmp_path / "bottom.yaml").write_text("base: [a]")
    assert "base must be the name of a recipe" in message(["--config", str(tmp_path / "bottom.yaml")])


def test_the_last_of_a_switch_and_its_opposite_wins() -> None:
    assert load(Root, ["--bf16", "--no-bf16"]).optimizer.bf16 is False
    assert load(Root, ["--no-load-optim", "--load-optim"]).optimizer.no_load_optim is False
    assert load(Root, ["--load-optim", "--no-load-optim"]).optimizer.no_load_optim is True


def test_what_print_config_prints_gives_the_same_config_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "phases: [{start: 1, mix: {ntp: 1}}, {start: 5, mix: {ntp: 0.5, sip: 1.5e-7}, kind: sip}]\n"
        "name: 'on'\nfruit: pear\ncache: /somewhere\nsizes: [3, 4]\nsource_weights: {'1e5': 2}\n"
    )
    argv = ["--config", recipe(tmp_path, text), "--lr", "5e-5", "--data-path", "no", "12:30", ""]
    with pytest.raises(SystemExit) as exit_:
        load(Root, [*argv, "--print-config"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "  lr: 5.0e-05  # flag\n" in printed
    assert "  name: 'on'  # recipe.yaml\n" in printed
    config = load(Root, argv)
    assert config.data.phases == (Phase(1, {"ntp": 1.0}), Phase(5, {"ntp": 0.5, "sip": 1.5e-7}, "sip"))
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert load(Root, ["--config", str(again)]) == config
    assert to_yaml(config).count("#") == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lrr", "3"], ["unknown flag --lrr", "did you mean --lr?"]),
        (["--train_iters=3"], ["unknown flag --train_iters", "did you mean --train-iters?"]),
        (["--train", "3"], ["unknown flag --train"]),
        (["stray"], ["'stray' belongs to no flag"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--lr", "fast"], ["--lr must be a number, not 'fast'"]),
        (["--lr", "-1"], ["--lr is -1.0: must be positive"]),
        (["--train-iters", "1.5"], ["--train-iters must be a whole number, not '1.5'"]),
        (["--lr-decay-style", "cosin"], ["must be one of cosine, linear, constant (did you mean cosine?)"]),
        (["--adam-betas", "0.9"], ["--adam-betas must be a list of 2 values, not ['0.9']"]),
        (["--source-weights", "x"], ["--source-weights must be words of the form name=value, not 'x'"]),
        (["--fruit", "plum"], ["--fruit must be one of apple, pear, not 'plum'"]),
        (["--level", "3"], ["--level must be one of 1, 2, max, not '3'"]),
        (["--bf16", "--train-iters", "13"], ["13 and bf16 do not go together"]),
        (["--config", "absent.yaml"], ["--config absent.yaml: cannot read it: No such file"]),
        (["--help", "optimiser"], ["no such section", "did you mean optimizer?", "optimizer, data"]),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_with_value_and_remedy(argv: list[str], words: list[str]) -> None:
    text = message(argv)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lrr: 3", ["recipe.yaml: unknown key lrr (did you mean lr?)"]),
        ("optimizer: {lrr: 3}", ["unknown key lrr in section 'optimizer' (did you mean lr?)"]),
        ("optimizer: {train_iters: 3}", ["train_iters belongs to section 'data', not to 'optimizer'"]),
        ("optimiser: {lr: 3}", ["unknown key optimiser (did you mean optimizer?)"]),
        ("optimizer: 3", ["section 'optimizer' must be a mapping"]),
        ("lr: fast", ["recipe.yaml: lr must be a number, not 'fast'"]),
        ("lr: true", ["lr must be a number, not True"]),
        ("lr: null", ["lr must be a number, not None"]),
        ("name: 3", ["name must be text, not 3"]),
        ("bf16: 1", ["bf16 must be true or false, not 1"]),
        ("train_iters: 2.5", ["train_iters must be a whole number, not 2.5"]),
        ("sizes: [1, x]", ["sizes must be a whole number, not 'x'"]),
        ("level: '1'", ["level must be one of 1, 2, max, not '1'"]),
        ("clip_grad: x", ["clip_grad must be a number, not 'x'"]),
        ("phases: [{start: 1, mixx: {}}]", ["with start, mix, kind (did you mean mix?), not 'mixx'"]),
        ("phases: [{mix: {}}]", ["start is missing"]),
        ("phases: [{start: x}]", ["its start a whole number, not 'x'"]),
        ("phases: [{start: 1, kind: dpo}]", ["its kind one of ntp, sip, not 'dpo'"]),
        ("lr: 1\noptimizer: {lr: 2}", ["lr is set twice"]),
        ("lr: 1\nlr: 2", ["recipe.yaml, line 2: not valid YAML: key 'lr' stands twice"]),
        ("a: [", ["not valid YAML"]),
        ("- a", ["must be a mapping of options, not list"]),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line_with_value_and_remedy(text: str, words: list[str], tmp_path: Path) -> None:
    found = message(["--config", recipe(tmp_path, text)])
    for word in words:
        assert word in found


def test_an_empty_recipe_and_an_empty_section_change_nothing(tmp_path: Path) -> None:
    assert load(Root, ["--config", recipe(tmp_path, "")]) == Root()
    assert load(Root, ["--config", recipe(tmp_path, "optimizer:\n")]) == Root()


def test_options_may_stand_in_the_root_and_be_required() -> None:
    assert load(Required, ["--input", "a", "--workers", "2"]) == Required("a", 2)
    assert message([], Required) == "--input is required: the input file"
    assert from_mapping(Required, {"input": "a"}) == Required("a")


def test_two_sections_with_one_name_are_refused_at_once() -> None:
    @dataclass(frozen=True)
    class Twice:
        a: OptimizerConfig = field(default_factory=OptimizerConfig)
        b: OptimizerConfig = field(default_factory=OptimizerConfig)

    with pytest.raises(TypeError, match=r"'lr' is in section 'a' and in section 'b'"):
        load(Twice, [])


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal_and_groups_by_section(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        load(Root, ["--help"], prog="prog", description="What it does.")
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= columns
    assert "\noptimizer - Optimizer and schedule:\n" in text and "\ndata - Corpora:\n" in text
    assert "--overlap, --no-overlap" in text and "(100 %)" in text and "--no-bf16" not in text
    with pytest.raises(SystemExit):
        load(Root, ["--help", "data"], prog="prog")
    text = capsys.readouterr().out
    assert "--train-iters" in text and "--lr" not in text


def test_help_of_a_section_without_a_name_and_of_empty_choices_has_no_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Alone:
        """What to ask."""

        kind: str = option("", help="vLLM servers that are asked", choices=("", "quality", "safety", "factuality-long"))

    with pytest.raises(SystemExit):
        load(Alone, ["--help"], prog="prog")
    text = " ".join(capsys.readouterr().out.split())
    assert " - " not in text.split("recipes and help")[1] and "one of quality, safety, factuality-long" in text
    assert "vLLM servers" in text


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(Root, ["--version"], version="program 1.2.3")
    assert capsys.readouterr().out == "program 1.2.3\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lr", "nan"], "--lr must be a finite number, not 'nan'"),
        (["--lr", "-inf"], "--lr must be a finite number"),
        (["--lr", "1e400"], "--lr must be a finite number"),
        (["--lr", "9" * 400], "--lr must be a finite number"),
        (["--train-iters", "1e30"], "--train-iters must be a whole number of at most 63 bits"),
        (["--train-iters", "9" * 5000], "--train-iters must be a whole number"),
        (["--train-iters", "nan"], "--train-iters must be a whole number"),
        (["--train-iters="], "--train-iters is empty: give a value"),
        (["--lr", "-1e-3x"], "--lr: expected one argument after it (--flag=VALUE"),
        (["--bf16=false"], "--bf16: a switch takes no value, not 'false'"),
        (["--level", "a\nb"], "not 'a\\nb'"),
    ],
)
def test_values_that_no_option_can_use_are_refused_by_the_machinery(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(Root, argv)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_negative_numbers_with_an_exponent_are_values_and_no_flags() -> None:
    with pytest.raises(ConfigurationError, match=r"--lr is -0\.001: must be positive"):
        load(Root, ["--lr", "-1e-3"])


@pytest.mark.parametrize(("text", "said"), [(".nan", "a finite number"), (".inf", "a finite number")])
def test_numbers_of_yaml_are_finite(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load(Root, ["--config", recipe(tmp_path, f"lr: {text}")])


def test_a_number_of_yaml_longer_than_python_reads_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"line 1: not valid YAML: a number of 5000 digits"):
        load(Root, ["--config", recipe(tmp_path, "lr: " + "9" * 5000)])


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(ConfigurationError("no file a\nb")) == "no file a\\nb"
