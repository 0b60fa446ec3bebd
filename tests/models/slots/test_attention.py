"""Attention of a few tokens to many cached ones: shared heads, masks, and slots that are skipped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from draftsmith.models.slots import attention
from draftsmith.models.slots.attention import attend, skipping
from draftsmith.models.trunk.attention import layer_attention

CASES = [(2, 6, 2, 5, 300, 32), (1, 8, 8, 16, 256, 16), (3, 9, 3, 1, 130, 16), (2, 4, 1, 7, 40, 8)]


class SharedHeads(nn.Module):
    """An attention layer of which three query heads share keys and values."""

    num_key_value_groups = 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("B", "H", "G", "N", "S", "D"), CASES)
def test_shared_heads_and_skipped_slots_give_the_numbers_of_repeated_keys(
    B: int, H: int, G: int, N: int, S: int, D: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(B, H, N, D, generator=generator)
    keys, values = torch.randn(2, B, G, S, D, generator=generator)
    ends = torch.tensor([S // 3, 7 + N, S - 1])[:B]
    mask = (torch.arange(S) < ends[:, None])[:, None, None].repeat(1, 1, N, 1)
    mask &= torch.rand(B, 1, N, S, generator=generator) > 0.3
    mask[..., 0] = True
    repeated = (part.repeat_interleave(H // G, dim=1) for part in (keys, values))
    expected = F.scaled_dot_product_attention(queries, *repeated, mask)
    torch.testing.assert_close(attend(queries, keys, values, mask), expected)
    torch.testing.assert_close(attend(queries, keys, values, skipping(mask, ends)), expected)


@pytest.mark.parametrize(("num_new", "num_slots"), [(1, 40), (5, 5)], ids=["one token", "causal"])
def test_without_a_mask_a_layer_attends_as_transformers_does(num_new: int, num_slots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 6, num_new, 16, generator=generator)
    keys, values = torch.randn(2, 1, 2, num_slots, 16, generator=generator)
    expected, _ = sdpa_attention_forward(SharedHeads(), queries, keys, values, None, scaling=0.2)
    own, _ = layer_attention(SharedHeads(), queries, keys, values, None, scaling=0.2)
    torch.testing.assert_close(own, expected)


def test_the_shapes_of_a_mask_that_skips_slots_do_not_depend_on_how_many_these_are() -> None:
    mask = torch.ones(2, 1, 5, 300, dtype=torch.bool)
    short, long = (skipping(mask, torch.tensor(ends)) for ends in ([5, 9], [290, 300]))
    assert short.kv_num_blocks.flatten().tolist() == [1, 1]
    assert long.kv_num_blocks.flatten().tolist() == [3, 3]
    assert short.kv_indices.shape == long.kv_indices.shape


def test_more_shapes_are_compiled_for_cuda_than_torch_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config

    def compiled(function: Callable[..., object], dynamic: bool) -> Callable[..., int]:
        assert not dynamic
        return lambda: config.recompile_limit

    before = config.recompile_limit
    monkeypatch.setattr(torch, "compile", compiled)
    attention._flex.cache_clear()
    try:
        assert attention._flex("cuda")() == attention._MOST_SHAPES > before
        assert config.recompile_limit == before
    finally:
        attention._flex.cache_clear()
