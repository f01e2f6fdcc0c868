"""Options of the policy: a preset, overrides of its numbers, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.model.presets import PRESETS, Architecture, RopeScaling

_OVERRIDES = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels",
    "max_position_embeddings", "rotary_base", "norm_epsilon", "untie_embeddings_and_output_weights", "add_qkv_bias",
    "qk_layernorm",
)  # fmt: skip
_POSITIVE = _OVERRIDES[:9]


@dataclass(frozen=True)
class ModelConfig:
    """The policy. What is left empty is taken from the preset; ``resolve()`` gives the numbers that hold."""

    preset: str = option(
        "tiny", help="Architecture to start from.", choices=tuple(PRESETS), also_called=("model", "model_size")
    )
    num_layers: int | None = option(None, help="Transformer layers [preset].")
    hidden_size: int | None = option(None, help="Width of the residual stream [preset].")
    num_attention_heads: int | None = option(None, help="Query heads [preset].")
    num_query_groups: int | None = option(None, help="Key-value heads [preset; all heads if the heads are given].")
    ffn_hidden_size: int | None = option(None, help="Width of the SwiGLU layer [preset].")
    kv_channels: int | None = option(None, help="Width of a head [preset; hidden / heads if either is given].")
    max_position_embeddings: int | None = option(None, help="Longest sequence, in tokens [preset].")
    rotary_base: float | None = option(None, help="Base of the RoPE frequencies [preset].")
    use_rope_scaling: bool | None = option(None, help="Stretch RoPE as Llama 3.1 does [preset].")
    rope_scaling_factor: float = option(8.0, help="By how much the low frequencies are slowed.")
    rope_low_freq_factor: float = option(1.0, help="Wavelengths above original length / this are slowed in full.")
    rope_high_freq_factor: float = option(4.0, help="Wavelengths below original length / this are left alone.")
    rope_original_max_position_embeddings: int = option(8192, help="Sequence length before stretching, in tokens.")
    norm_epsilon: float | None = option(None, help="Added to the mean square in RMSNorm [preset].")
    untie_embeddings_and_output_weights: bool | None = option(
        None, help="Give the output layer weights of its own [preset]."
    )
    add_qkv_bias: bool | None = option(None, help="Biases on queries, keys and values [preset].")
    qk_layernorm: bool | None = option(None, help="RMSNorm on the heads of queries and keys [preset].")
    make_vocab_size_divisible_by: int = option(128, help="Pad the vocabulary to a multiple of this times TP.")
    init_method_std: float = option(0.02, help="Standard deviation of the initial weights.")
    attention_dropout: float = option(0.0, help="Only 0: log-probs of a step must not depend on chance.")
    hidden_dropout: float = option(0.0, help="Only 0, as above.")
    bf16: bool = option(False, help="Compute in bfloat16; the optimizer keeps float32 weights.")
    recompute_granularity: str | None = option(
        None, help="Recompute activations in the backward pass: attention only, or whole layers.",
        choices=("selective", "full"),
    )  # fmt: skip
    recompute_method: str = option(
        "uniform", help="With full: every chunk of layers, or the first layers of each stage.",
        choices=("uniform", "block"),
    )  # fmt: skip
    recompute_num_layers: int = option(1, help="With full: layers of a chunk (uniform) or of a stage (block).")
    transformer_impl: str = option(
        "auto", help="Kernels: auto takes Transformer Engine where it is installed, on CUDA.",
        choices=("auto", "local", "transformer_engine"),
    )  # fmt: skip

    def resolve(self) -> Architecture:
        """The preset with the overrides.

        Raises:
            ConfigurationError: the preset is unknown.
        """
        if self.preset not in PRESETS:
            raise ConfigurationError(f"--preset {self.preset!r} is unknown: choose one of {', '.join(PRESETS)}.")
        preset = PRESETS[self.preset]
        changes = {name: getattr(self, name) for name in _OVERRIDES if getattr(self, name) is not None}
        if "num_attention_heads" in changes:
            changes.setdefault("num_query_groups", changes["num_attention_heads"])
        if "num_attention_heads" in changes or "hidden_size" in changes:
            heads = changes.get("num_attention_heads", preset.num_attention_heads)
            changes.setdefault("kv_channels", changes.get("hidden_size", preset.hidden_size) // max(heads, 1))
        if self.use_rope_scaling is not None:
            changes["rope_scaling"] = self._rope_scaling() if self.use_rope_scaling else None
        return replace(preset, **changes)

    def validate(self) -> None:
        """Checks the architecture on its own.

        Raises:
            ConfigurationError: a number that cannot work, with its remedy.
        """
        a = self.resolve()
        for name in _POSITIVE:
            if getattr(a, name) <= 0:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(a, name)}: give a positive number.")
        if a.num_attention_heads % a.num_query_groups:
            raise ConfigurationError(
                f"--num-attention-heads {a.num_attention_heads} is not divisible by --num-query-groups "
                f"{a.num_query_groups}: choose a divisor."
            )
        if a.kv_channels % 2:
            raise ConfigurationError(
                f"--kv-channels is {a.kv_channels} (hidden size / heads unless given), but RoPE turns pairs: "
                "give an even number."
            )
        if self.attention_dropout or self.hidden_dropout:
            raise ConfigurationError(
                f"--attention-dropout {self.attention_dropout} and --hidden-dropout {self.hidden_dropout} must be 0: "
                "log-probs of policy, reference and rollouts are compared with each other. Leave both out."
            )
        for name in ("recompute_num_layers", "make_vocab_size_divisible_by"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1.")
        if self.init_method_std <= 0:
            raise ConfigurationError(f"--init-method-std is {self.init_method_std}: give a number above 0.")
        if self.use_rope_scaling:
            self._validate_rope_scaling()

    def validate_tensor_parallel(self, tensor_model_parallel_size: int) -> None:
        """Checks that the architecture divides into tensor-parallel ranks.

        Raises:
            ConfigurationError: heads, groups or widths do not divide, with a remedy.
        """
        a = self.resolve()
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "hidden_size"):
            if getattr(a, name) % tensor_model_parallel_size:
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} {getattr(a, name)} is not divisible by --tensor-model-parallel-size "
                    f"{tensor_model_parallel_size}: change one of them."
                )

    def validate_recompute(self, stage_layers: int) -> None:
        """Checks what is recomputed against the layers of a (virtual) pipeline stage.

        Raises:
            ConfigurationError: chunks do not divide the stage, which Megatron finds out in the first forward pass.
        """
        n = self.recompute_num_layers
        if self.recompute_granularity != "full" or n == 1:
            return
        if n > stage_layers or (self.recompute_method == "uniform" and stage_layers % n):
            raise ConfigurationError(
                f"--recompute-num-layers {n} does not fit the {stage_layers} layers of a pipeline stage: choose a "
                "divisor (uniform), or no more than they are (block)."
            )

    def _validate_rope_scaling(self) -> None:
        for name in (
            "rope_scaling_factor",
            "rope_low_freq_factor",
            "rope_high_freq_factor",
            "rope_original_max_position_embeddings",
        ):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0.")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ConfigurationError(
                f"--rope-low-freq-factor {self.rope_low_freq_factor} must be below --rope-high-freq-factor "
                f"{self.rope_high_freq_factor}: between them the slowing is blended."
            )

    def _rope_scaling(self) -> RopeScaling:
        return RopeScaling(
            factor=self.rope_scaling_factor,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
            original_max_position_embeddings=self.rope_original_max_position_embeddings,
        )
