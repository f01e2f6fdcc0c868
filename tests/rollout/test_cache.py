"""Covers cached attention beside dense attention over whole sequences, ragged prefixes and dropped rows included."""

import pytest
import torch

from megatron_sip.rollout.cache import RolloutCache

DEPTH, NEW_TOKENS = 8, 5


def dense_last(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """query [h, d] of the last token, keys and values [n, g, d] of the whole sequence -> [h * d], head by head."""
    shared = query.shape[0] // keys.shape[1]
    outputs = []
    for head, vector in enumerate(query):
        scores = keys[:, head // shared] @ vector / DEPTH**0.5
        outputs.append(scores.softmax(0) @ values[:, head // shared])
    return torch.cat(outputs)


@pytest.mark.parametrize(("heads", "groups", "slots"), [(4, 4, 3), (4, 2, 3), (6, 1, 2), (2, 2, 1)])
def test_cached_attention_equals_dense_attention_over_each_sequence(heads: int, groups: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(heads * 10 + slots)
    lengths = torch.tensor([5, 3, 6, 1])
    cache = RolloutCache(lengths, slots, NEW_TOKENS)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, DEPTH, generator=generator, dtype=torch.float64)

    query, key, value = make(6, 4, heads), make(6, 4, groups), make(6, 4, groups)
    for layer in (1, 2):
        output = cache.attend(layer, query, key * layer, value)
        for prefix, length in enumerate(lengths.tolist()):
            expected = dense_last(query[length - 1, prefix], key[:length, prefix] * layer, value[:length, prefix])
            torch.testing.assert_close(output[length - 1, prefix], expected, rtol=0, atol=2e-6)

    rows = [(prefix, slot) for prefix in range(4) for slot in range(slots)]
    own: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {row: [] for row in rows}
    for step in range(NEW_TOKENS):
        if step == 3:  # prefix 1 is done, and so is the first slot of the others
            kept = torch.tensor([0, 2, 3])
            remaining = list(range(1, slots)) or [0]
            cache.select(kept, torch.tensor([remaining] * 3))
            rows = [(prefix, slot) for prefix in kept.tolist() for slot in remaining]
        # Now and then more own tokens are looked at than there are.
        cache.start_decode_step(torch.tensor([step]), width=min(step + 1 + step % 2, NEW_TOKENS))
        padded = len(rows) + 1  # one row of padding, as sequence parallelism adds
        query, own_key, own_value = make(padded, 1, heads), make(padded, 1, groups), make(padded, 1, groups)
        outputs = {layer: cache.attend(layer, query, own_key * layer, own_value) for layer in (1, 2)}
        for index, row in enumerate(rows):
            own[row].append((own_key[index], own_value[index]))
            keys = torch.cat([key[: lengths[row[0]], row[0]], *(pair[0] for pair in own[row])])
            values = torch.cat([value[: lengths[row[0]], row[0]], *(pair[1] for pair in own[row])])
            for layer in (1, 2):
                expected = dense_last(query[index, 0], keys * layer, values)
                torch.testing.assert_close(outputs[layer][index, 0], expected, rtol=0, atol=2e-6)
