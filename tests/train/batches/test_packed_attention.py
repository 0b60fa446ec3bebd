"""Attention over packed documents is that of its definition, by every path that computes it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from draftsmith.models.slots import rollout_attention
from draftsmith.models.slots.rollout_attention import RolloutAttention


def attention_case(
    lengths: list[int], num_further: int, seed: int = 0, size: int = 4, device: str = "cpu"
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, size, generator=generator).to(device).requires_grad_()

    positions = torch.cat([torch.arange(length) for length in lengths])
    anchors = torch.nonzero(torch.rand(len(positions), generator=generator) < 0.6).flatten()
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return {
        "document_ids": document_ids.to(device),
        "positions": positions.to(device),
        "anchors": anchors.to(device),
        "keys": rows(len(positions), 2),
        "values": rows(len(positions), 2),
        "queries": rows(len(anchors), 4),
        "further": [(rows(len(anchors), 2), rows(len(anchors), 2)) for _ in range(num_further)],
    }


def made(case: dict[str, Any], **chosen: Any) -> RolloutAttention:
    return RolloutAttention(
        *(case[name] for name in ("document_ids", "positions", "anchors", "keys", "values")), **chosen
    )


def gradients_of(output: torch.Tensor, case: dict[str, Any]) -> list[torch.Tensor]:
    """Those of a sum that weighs every entry differently."""
    leaves = [case["queries"], case["keys"], case["values"], *(part for pair in case["further"] for part in pair)]
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), leaves))


def plainly(case: dict[str, Any]) -> torch.Tensor:
    """Every query against every key, masked."""
    keys, values = (
        torch.cat([case[name], *(pair[place] for pair in case["further"])])
        for place, name in enumerate(("keys", "values"))
    )
    pairs = torch.meshgrid(torch.arange(len(case["anchors"])), torch.arange(len(keys)), indexing="ij")
    mask = made(case).sees()(torch.zeros(()), torch.zeros(()), *pairs)
    layout = (part.transpose(0, 1)[None] for part in (case["queries"], keys, values))
    attended = torch.nn.functional.scaled_dot_product_attention(*layout, attn_mask=mask, enable_gqa=True)
    return attended[0].transpose(0, 1)


def one_by_one(case: dict[str, Any]) -> torch.Tensor:
    """The definition, in loops: the anchor's own document up to itself, then its own steps."""
    document_of, rows = case["document_ids"].tolist(), []
    for query, anchor in enumerate(case["anchors"].tolist()):
        seen = [place for place in range(anchor + 1) if document_of[place] == document_of[anchor]]
        keys = torch.cat([case["keys"][seen], *(key[query][None] for key, _ in case["further"])])
        values = torch.cat([case["values"][seen], *(value[query][None] for _, value in case["further"])])
        heads = []
        for head, own in enumerate(case["queries"][query]):
            weights = torch.softmax(keys[:, head // 2] @ own / own.shape[0] ** 0.5, dim=0)
            heads.append(weights @ values[:, head // 2])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def detached(case: dict[str, Any]) -> dict[str, Any]:
    """flex_attention has no backward pass on a CPU, and refuses what might need one."""
    further = [(key.detach(), value.detach()) for key, value in case["further"]]
    return {name: part.detach() for name, part in case.items() if name != "further"} | {"further": further}


@pytest.mark.parametrize("num_further", [0, 2])
@pytest.mark.parametrize("flexible", [False, True])
def test_attention_is_that_of_its_definition(num_further: int, flexible: bool) -> None:
    case = detached(attention_case([13, 1, 6, 2, 21, 5, 6], num_further))
    expected = one_by_one(case)
    output = made(case, flexible=flexible)(case["queries"], case["further"])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plainly(case), expected, rtol=1e-4, atol=1e-6)


def test_batches_of_every_size_share_a_few_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up compiling after eight variants, and then every score would be in memory."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(rollout_attention, "_flex", lambda device_type: compiled)
    for seed, lengths in enumerate([[300, 7, 200], [90], [151, 152, 20], [129], [3, 3], [640, 64], [77, 78], [260, 1]]):
        for num_further in range(3):
            case = detached(attention_case(lengths, num_further, seed))
            output = made(case, flexible=True)(case["queries"], case["further"])
            torch.testing.assert_close(output, made(case)(case["queries"], case["further"]), rtol=1e-4, atol=1e-6)
    assert 0 < counter.frame_count < torch._dynamo.config.recompile_limit
    torch._dynamo.reset()


@pytest.mark.parametrize("num_further", [0, 2])
@pytest.mark.parametrize("block_scores", [1, 60, 500, 3000, 2**23])
def test_attention_in_blocks_equals_that_over_every_pair(num_further: int, block_scores: int) -> None:
    case = attention_case([13, 1, 6, 2, 21, 5, 6], num_further)
    plain = plainly(case)
    output = made(case, flexible=False, block_scores=block_scores)(case["queries"], case["further"])
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-6)
    for found, expected in zip(gradients_of(output, case), gradients_of(plain, case), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_further", [0, 2])
def test_on_a_gpu_attention_needs_neither_scores_nor_a_mask_of_every_pair(num_further: int) -> None:
    lengths = [300, 7, 500, 60, 400]
    case, plain_case = (attention_case(lengths, num_further, size=16, device=device) for device in ("cuda", "cpu"))
    output, plain = made(case)(case["queries"], case["further"]), plainly(plain_case)
    torch.testing.assert_close(output.cpu(), plain, rtol=1e-2, atol=1e-2)
    for found, expected in zip(gradients_of(output.cpu(), case), gradients_of(plain, plain_case), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
    # 10 k anchors and 16 k tokens: every pair would take 160 MB a byte and step, and positions eight times that.
    long = attention_case([16_000, 300, 84], num_further, size=16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients_of(made(long)(long["queries"], long["further"]), long)
    assert torch.cuda.max_memory_allocated() - before < 2**28


def test_attention_over_long_text_keeps_no_scores() -> None:
    """A text of 700 tokens has 2 million scores in 4 heads; kept for the backward pass are far fewer numbers."""
    case = attention_case([700, 10, 10, 30], 2)
    kept = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept = max(kept, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = made(case, flexible=False, block_scores=50_000)(case["queries"], case["further"])
        gradients_of(output, case)
    assert 0 < kept <= 60_000


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 2), st.integers(0, 3))
def test_the_block_mask_is_the_one_found_by_asking_for_every_pair(
    lengths: list[int], num_further: int, seed: int
) -> None:
    case = attention_case(lengths, num_further, seed)
    if not len(case["anchors"]):
        return
    attention = made(case)
    num_keys = len(case["keys"]) + num_further * len(case["anchors"])
    asked = create_block_mask(attention.sees(), None, None, len(case["anchors"]), num_keys, device="cpu")
    own = attention.block_mask(num_further)
    assert own.shape == asked.shape
    full, asked_full = (blocks(mask.full_kv_num_blocks, mask.full_kv_indices) for mask in (own, asked))
    assert full == asked_full
    partial, asked_partial = (blocks(mask.kv_num_blocks, mask.kv_indices) for mask in (own, asked))
    assert partial >= asked_partial
    # A block may be asked in vain where a document in its midst has no anchors, and at the seam of text and steps.
    assert len(partial - asked_partial) <= 2 + len(lengths)


def blocks(counts: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int]]:
    rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return {(number, index) for number, (count, row) in enumerate(rows) for index in row[:count]}
