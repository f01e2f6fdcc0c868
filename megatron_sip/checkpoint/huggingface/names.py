"""Names that the command lines of conversion share with the conversion itself; needs no torch."""

from __future__ import annotations

CARRIED_DIRECTORY = "huggingface"
"""Beside a converted checkpoint: configuration and tokenizer of the model that it came from."""
RECIPE = "recipe.yaml"
DTYPE_NAMES = ("keep", "float32", "bfloat16")
"""Types of converted weights; keep: as they are."""
