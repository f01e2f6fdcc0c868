"""The policy: Megatron-Core's GPTModel with positions per row, a plan of attention, and outputs on demand.

Shapes: B or b rows, S or s row length, L scored positions, H hidden size, V padded vocabulary,
tp tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.model.layers import PassInputs
from megatron_sip.model.logprobs import mask_padded_vocabulary
from megatron_sip.model.output_layer import target_log_probs
from megatron_sip.model.outputs import ModelOutput, NextLogits, ScoreTargets
from megatron_sip.model.presets import Architecture
from megatron_sip.model.rope import inverse_frequencies, rotation_of
from megatron_sip.types import AttentionPlan


class PolicyModel(GPTModel):
    """One (virtual) pipeline stage of the policy. Its weights are named as GPTModel names them.

    Args:
        config: Megatron's configuration.
        architecture: for RoPE and for whether the output layer is the embedding.
        block: layers and final norm of this stage.
        vocab_size: tokens of the tokenizer.
        padded_vocab_size: rows of the embedding.
        device: where angles are computed.
        pre_process, post_process: whether this stage has the embedding, or the output layer.
        vp_stage: number of the virtual stage on this rank, None without virtual stages.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        block: TransformerBlockSubmodules,
        vocab_size: int,
        padded_vocab_size: int,
        device: torch.device,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not architecture.untie_embeddings_and_output_weights,
            position_embedding_type="none",  # ours below: Megatron's ignores positions
            vp_stage=vp_stage,
        )
        self.num_tokens = vocab_size
        # Neither parameter nor buffer: it must stay float32 in a bfloat16 model, and no checkpoint needs it.
        self.rotary_frequencies = inverse_frequencies(architecture, device)
        if post_process:
            # It is given gathered positions, also with sequence parallelism: its input's gradient is then summed over
            # the ranks, and the gather's backward must only split it (see _scored_hidden).
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.pg_collection.tp.size() > 1

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, output: ModelOutput | None
    ) -> torch.Tensor:
        """Runs this stage; the input of a stage that is not the first was given by ``set_input_tensor``.

        Args:
            tokens: int64 [B, S]; with sequence parallelism S must be a multiple of the tensor-parallel size.
            positions: int64 [B, S], for RoPE; needed on every stage.
            plan: how the tokens attend to each other.
            output: what the last stage computes; other stages do not look at it.

        Returns:
            Last stage: float32 [B, L] for ``ScoreTargets``, float32 [B, L, V / tp] for ``NextLogits``.
            Another: its hidden states [S, B, H], or [S / tp, B, H] with sequence parallelism.

        Raises:
            ValueError: S does not divide under sequence parallelism, or the last stage is asked for nothing.
        """
        tp_size = self.pg_collection.tp.size()
        if self.config.sequence_parallel and tokens.shape[1] % tp_size:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens cannot be split over {tp_size} sequence-parallel ranks: "
                "pad the prefix block, or use without_sequence_parallel() to generate"
            )
        hidden = self.embedding(input_ids=tokens, position_ids=positions) if self.pre_process else None
        rotation = rotation_of(positions, self.rotary_frequencies, self.config.params_dtype)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            attention_bias=PassInputs(plan, rotation),
        )
        if not self.post_process:
            return hidden
        if output is None:
            raise ValueError("the last stage needs an output: ScoreTargets or NextLogits")
        scored = self._scored_hidden(hidden, output.sources)
        if isinstance(output, NextLogits):
            logits = self._logits(scored)
            masked = mask_padded_vocabulary(logits.float(), self.num_tokens, self.pg_collection.tp.rank())
            return masked.transpose(0, 1)
        return self._log_probs(scored, output)

    def _scored_hidden(self, hidden: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """[S or S / tp, B, H] and sources [B, L] -> [L, B, H], so that only these pass through the output layer."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        rows = torch.arange(hidden.shape[1], device=hidden.device)
        return hidden[sources.t(), rows]

    def _log_probs(self, hidden: torch.Tensor, output: ScoreTargets) -> torch.Tensor:
        """[L, B, H] -> float32 [B, L]."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        gradient = None if output.gradient is None else output.gradient.t().flatten()
        log_probs = target_log_probs(
            hidden.flatten(0, 1), weight, output.targets.t().flatten(), self.num_tokens, self.pg_collection.tp,
            gradient, tied=tied and self.pre_process,
        )  # fmt: skip
        return log_probs.view(hidden.shape[:2]).t()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, B, H] -> [L, B, V / tp], in the model's precision."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return logits


_SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def without_sequence_parallel(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Switches sequence parallelism off in the model's modules, for forward passes without gradients.

    Generation takes one token at a time, which cannot be split over ranks. With the switch off a stage hands on hidden
    states [S, B, H]. Nothing to do for a model without it.
    """
    switched: list[tuple[Any, str]] = []
    for chunk in chunks:
        for module in chunk.modules():
            for owner in (module, getattr(module, "config", None)):
                for name in _SEQUENCE_PARALLEL_SWITCHES:
                    if getattr(owner, name, None) is True:
                        setattr(owner, name, False)
                        switched.append((owner, name))
    try:
        yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
