"""A machine as the planner sees it: peaks from its data sheet, and what part of them each kind of work reaches.

Every efficiency must say in ``sources`` whether it was measured or assumed, and where it comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config import from_mapping, option
from megatron_sip.config.suggest import did_you_mean
from megatron_sip.config.yaml_text import read_yaml
from megatron_sip.errors import ConfigurationError

KINDS = ("measured", "assumed")


@dataclass(frozen=True)
class DeviceConfig:
    """One device: a GPU, or one core of a machine without."""

    peak_tflops: float = option(help="TFLOP/s of matrix products at the precision of training, dense")
    memory_bandwidth_gb_s: float = option(help="GB/s between the device and its memory")
    memory_gib: float = option(help="GiB of memory of the device")
    devices_per_node: int = option(8, help="devices that share the link within a node")


@dataclass(frozen=True)
class LinkConfig:
    """What collectives cross: one rank's GB/s, and seconds before the first byte."""

    node_bandwidth_gb_s: float = option(help="GB/s that a rank sends within a node, reached by collectives")
    node_latency_us: float = option(help="microseconds of a collective of one number within a node")
    network_bandwidth_gb_s: float = option(help="GB/s that a rank sends to another node, reached by collectives")
    network_latency_us: float = option(help="microseconds of a collective of one number between nodes")


@dataclass(frozen=True)
class EfficiencyConfig:
    """Parts of the peaks that each kind of pass reaches, and the time of a layer's launches.

    ``train``: forward and backward; ``forward``: forward alone (reference); ``prefill`` and ``decode``: rollouts.
    """

    train_matmul: float = option(help="share of peak_tflops in products of weights, forward and backward")
    train_attention: float = option(help="share of peak_tflops in attention, forward and backward")
    train_memory: float = option(help="share of the memory bandwidth in everything else")
    train_launch_us: float = option(help="microseconds of a layer on one micro-batch that no size explains")
    forward_matmul: float = option(help="share of peak_tflops in products of weights, forward alone")
    forward_attention: float = option(help="share of peak_tflops in attention, forward alone")
    forward_memory: float = option(help="share of the memory bandwidth in everything else, forward alone")
    forward_launch_us: float = option(help="microseconds of a layer on one micro-batch, forward alone")
    prefill_matmul: float = option(help="share of peak_tflops in products of weights while prefixes are read")
    prefill_attention: float = option(help="share of peak_tflops in attention while prefixes are read")
    prefill_memory: float = option(help="share of the memory bandwidth while prefixes are read")
    prefill_launch_us: float = option(help="microseconds of a layer on one batch of prefixes")
    decode_matmul: float = option(help="share of peak_tflops in products of weights while tokens are drawn")
    decode_attention: float = option(help="share of peak_tflops in attention while tokens are drawn")
    decode_memory: float = option(help="share of the memory bandwidth in weights, cache and logits of a token")
    decode_launch_us: float = option(help="microseconds of a layer per token of a batch")
    optimizer_memory: float = option(help="share of the memory bandwidth in the optimizer step")
    optimizer_launch_us: float = option(help="microseconds of a layer's tensors in the optimizer step")
    busy_slowdown: float = option(1.0, help="by how much ranks of one node slow each other down, 1 = not at all")
    step_ms: float = option(0.0, help="milliseconds of a step that no timer covers: drawing, packing, metrics, logging")
    embedded_judge_ms: float = option(1.0, help="milliseconds of a batch of questions to the embedded judge")
    embedded_judge_us: float = option(10.0, help="microseconds per token of a candidate in the embedded judge")

    def validate(self) -> None:
        """Raise ConfigurationError for a value that cannot be one."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name.endswith(("_us", "_ms")):
                if value < 0:
                    raise ConfigurationError(f"{item.name} is {value:g}: give 0 or more")
            elif item.name == "busy_slowdown":
                if value < 1:
                    raise ConfigurationError(f"{item.name} is {value:g}: give 1 or more")
            elif not 0 < value <= 1:
                raise ConfigurationError(f"{item.name} is {value:g}: give a share of the peak above 0, at most 1")


@dataclass(frozen=True)
class Hardware:
    """A hardware file of examples/hardware/."""

    device: DeviceConfig
    link: LinkConfig
    efficiency: EfficiencyConfig
    name: str = option("", help="what it is called in the report")
    sources: Mapping[str, str] = option(
        default_factory=dict, help="name of each efficiency -> 'measured: how' or 'assumed: from what'"
    )

    def validate(self) -> None:
        """Raise ConfigurationError for numbers that cannot be, and for efficiencies without a source."""
        for section in (self.device, self.link):
            for item in dataclasses.fields(section):
                value = getattr(section, item.name)
                if value < 0 or (value == 0 and not item.name.endswith("_us")):
                    raise ConfigurationError(f"{item.name} is {value:g}: give a number above 0")
        names = [item.name for item in dataclasses.fields(self.efficiency)]
        for name in names:
            source = self.sources.get(name, "")
            if source.split(":")[0] not in KINDS:
                raise ConfigurationError(
                    f"sources.{name} is {source!r}: say 'measured: how' or 'assumed: from what' of every efficiency"
                )
        for name in self.sources:
            if name not in names:
                raise ConfigurationError(f"sources has no efficiency {name}{did_you_mean(name, names)}")


@dataclass(frozen=True)
class ServedModelConfig:
    """The model behind the judge's servers."""

    total_parameters: float = option(help="parameters, all experts together")
    active_parameters: float = option(help="parameters that a token is multiplied with")
    weight_bytes_per_parameter: float = option(help="bytes of a parameter as it is served")
    cache_bytes_per_token: float = option(help="bytes of keys and values of a token, all layers together")
    expert_share: float = option(1.0, help="experts that a token goes through, of a layer's all; 1 without experts")


@dataclass(frozen=True)
class ServingConfig:
    """How it is served, and on what."""

    gpu_tflops: float = option(help="TFLOP/s of one of the judge's GPUs")
    gpu_bandwidth_gb_s: float = option(help="GB/s of its memory")
    prefill_efficiency: float = option(help="share of its TFLOP/s while prompts are read")
    decode_efficiency: float = option(help="share of its memory bandwidth while verdicts are written")
    gpus_per_server: int = option(1, help="GPUs of one server")
    sequences_per_server: int = option(256, help="verdicts that a server writes at a time")


@dataclass(frozen=True)
class QuestionConfig:
    """A question to the judge, in tokens."""

    template_tokens: int = option(400, help="tokens of a prompt besides prefix and continuations")
    answer_tokens: int = option(256, help="tokens of a verdict, reasoning included, on average")
    prefix_cache_hits: float = option(0.0, help="share of prefix tokens that the server's prefix cache has, 0..1")

    def validate(self) -> None:
        """Raise ConfigurationError for a value that cannot be one."""
        if not 0 <= self.prefix_cache_hits <= 1:
            raise ConfigurationError(f"prefix_cache_hits is {self.prefix_cache_hits:g}: give a share from 0 to 1")
        if self.answer_tokens < 1:
            raise ConfigurationError(f"answer_tokens is {self.answer_tokens}: give at least 1")


@dataclass(frozen=True)
class JudgeServer:
    """A file of examples/hardware/judges/."""

    served_model: ServedModelConfig
    serving: ServingConfig
    question: QuestionConfig
    name: str = option("", help="what it is called in the report")
    notes: Mapping[str, str] = option(default_factory=dict, help="name -> where a number comes from")

    def validate(self) -> None:
        """Raise ConfigurationError for a number that cannot be."""
        for section in (self.served_model, self.serving):
            for item in dataclasses.fields(section):
                if getattr(section, item.name) <= 0:
                    raise ConfigurationError(f"{item.name} is {getattr(section, item.name):g}: give a number above 0")
        shares = (self.serving.prefill_efficiency, self.serving.decode_efficiency, self.served_model.expert_share)
        names = ("prefill_efficiency", "decode_efficiency", "expert_share")
        for name, value in zip(names, shares, strict=True):
            if value > 1:
                raise ConfigurationError(f"{name} is {value:g}: give a share of at most 1")


def load_hardware(path: Path) -> Hardware:
    """Reads and checks a hardware file. Raises ConfigurationError."""
    _require(path, "--hardware")
    return from_mapping(Hardware, read_yaml(path), str(path))


def load_judge_server(path: Path) -> JudgeServer:
    """Reads and checks a judge file. Raises ConfigurationError."""
    _require(path, "--judge-server")
    return from_mapping(JudgeServer, read_yaml(path), str(path))


def _require(path: Path, flag: str) -> None:
    if path.is_file():
        return
    folder = path.parent if path.parent.is_dir() else Path("examples/hardware")
    there = ", ".join(str(other) for other in sorted(folder.glob("*.yaml")))
    raise ConfigurationError(f"{flag} {path}: there is no such file" + (f"; there are {there}" if there else ""))
