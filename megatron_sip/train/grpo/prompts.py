"""From an example's texts to the token ids of a prompt that fits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.teacher.http.templates import Template
from megatron_sip.tokenizer import Tokenizer
from megatron_sip.types import IntArray

PREFIX = "prefix"
_ROUNDS = 4


class PromptEncoder:
    """Renders templates and encodes them by the model's chat format."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def encode(self, template: Template, values: Mapping[str, str], where: str) -> IntArray:
        """Token ids [<= max_tokens]. A prefix that makes the prompt too long loses its beginning.

        White space at the very end is left out: it would split the answer's first token from its blank. Raises
        ``DataError`` naming ``where`` if the prompt is too long without any prefix.
        """
        ids = self._render(template, values)
        prefix = self._tokenizer.encode(values.get(PREFIX, ""))
        # Re-encoding a cut prefix may give a token more or less, hence more than one round.
        for _ in range(_ROUNDS):
            excess = len(ids) - self._max_tokens
            if excess <= 0 or not prefix:
                break
            prefix = prefix[excess:]
            ids = self._render(template, {**values, PREFIX: self._tokenizer.decode(prefix)})
        if len(ids) > self._max_tokens:
            raise DataError(
                f"{where}: its prompt has {len(ids)} tokens without its prefix, more than --prompt-length "
                f"{self._max_tokens}: raise that, or make examples with shorter suffixes"
            )
        return np.asarray(ids, dtype=np.int64)

    def _render(self, template: Template, values: Mapping[str, str]) -> list[int]:
        messages = template.render(values)
        messages[-1]["content"] = messages[-1]["content"].rstrip()
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
        return self._tokenizer.encode_chat(messages)
