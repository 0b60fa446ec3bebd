"""Block verification: the target's joint law by enumeration, and how much longer the kept prefixes are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.decode.verify.block_walk import block_law, block_walk
from draftsmith.models import DraftTree, SampledChildren
from draftsmith.models.tree.noise import keys_at, uniforms

ROOT = 0


def law(seed: int, vocab: int, zeros: int = 0, sharpness: float = 2.0) -> Tensor:
    """float64 [V], random, some of it 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(vocab, generator=generator, dtype=torch.float64).pow(sharpness) + 1e-6
    weights[torch.randperm(vocab, generator=generator)[:zeros]] = 0.0
    return weights / weights.sum()


class Laws:
    """A distribution behind every prefix, made once from its tokens."""

    def __init__(self, seed: int, vocab: int, zeros: int = 0) -> None:
        self.seed, self.vocab, self.zeros = seed, vocab, zeros
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, prefix: tuple[int, ...]) -> Tensor:
        if prefix not in self._made:
            number = sum((token + 1) * (self.vocab + 1) ** place for place, token in enumerate(prefix))
            self._made[prefix] = law(1000 * self.seed + number, self.vocab, self.zeros)
        return self._made[prefix]


def chains(draft: Laws, length: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every chain that can be drawn, with its chance."""
    for chain in itertools.product(range(draft.vocab), repeat=length):
        chance = 1.0
        for place, token in enumerate(chain):
            chance *= float(draft(chain[:place])[token])
        if chance > 0.0:
            yield chain, chance


def rule_at(target: Laws, draft: Laws, chain: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Chance to end at each node of a chain, float64 [N], and the law of the token behind it, float64 [N, V]."""
    prefixes = [chain[:place] for place in range(len(chain) + 1)]
    target_1NV = torch.stack([target(prefix) for prefix in prefixes])[None]
    draft_1NV = torch.stack([*(draft(prefix) for prefix in prefixes[:-1]), torch.zeros(draft.vocab)])[None]
    keep_1N, rest_1NV = block_law(torch.tensor([[ROOT, *chain]]), target_1NV, draft_1NV)
    longer_N = torch.cat([(1.0 - keep_1N[0]).flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    return keep_1N[0] * longer_N, rest_1NV[0] / rest_1NV[0].sum(-1, keepdim=True)


def joint(laws: Laws, length: int) -> Tensor:
    """float64 [V] * length: the law of so many tokens."""
    whole = torch.zeros((laws.vocab,) * length, dtype=torch.float64)
    for text in itertools.product(range(laws.vocab), repeat=length):
        chance = 1.0
        for place, token in enumerate(text):
            chance *= float(laws(text[:place])[token])
        whole[text] = chance
    return whole


def emitted(target: Laws, draft: Laws, length: int) -> Tensor:
    """float64 [V] * (length + 1): the verified prefix, the token behind it, then the target's own tokens."""
    whole = torch.zeros((target.vocab,) * (length + 1), dtype=torch.float64)
    for chain, chance in chains(draft, length):
        ends_N, rest_NV = rule_at(target, draft, chain)
        for kept in range(length + 1):
            for token in range(target.vocab):
                prefix = (*chain[:kept], token)
                for others in itertools.product(range(target.vocab), repeat=length - kept):
                    rest = 1.0
                    for place, nxt in enumerate(others):
                        rest *= float(target((*prefix, *others[:place]))[nxt])
                    whole[(*prefix, *others)] += chance * float(ends_N[kept] * rest_NV[kept, token]) * rest
    return whole


@pytest.mark.parametrize("zeros", [(0, 0), (0, 1), (1, 0), (1, 2)], ids=["full", "draft", "target", "both"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_chain_emits_the_targets_joint_law_by_enumeration(length: int, zeros: tuple[int, int]) -> None:
    target, draft = Laws(1, 3, zeros[0]), Laws(2, 3, zeros[1])
    assert float((emitted(target, draft, length) - joint(target, length + 1)).abs().sum()) / 2 < 1e-12


@settings(max_examples=15, deadline=None)
@given(seeds=st.tuples(st.integers(0, 500), st.integers(501, 999)), vocab=st.integers(2, 3), zeros=st.integers(0, 1))
def test_any_two_models_give_the_targets_law(seeds: tuple[int, int], vocab: int, zeros: int) -> None:
    target, draft = Laws(seeds[0], vocab), Laws(seeds[1], vocab, zeros)
    assert float((emitted(target, draft, 2) - joint(target, 3)).abs().sum()) / 2 < 1e-12


def token_by_token(target: Laws, draft: Laws, chain: tuple[int, ...]) -> float:
    """Accepted tokens of a chain that ends at its first rejection."""
    reached, total = 1.0, 0.0
    for place, token in enumerate(chain):
        reached *= min(1.0, float(target(chain[:place])[token] / draft(chain[:place])[token]))
        total += reached
    return total


def test_a_block_keeps_more_than_a_chain_that_ends_at_its_first_rejection() -> None:
    gains = []
    for seed in range(1, 9):
        target, draft = Laws(seed, 3), Laws(seed + 50, 3)
        kept = sum(
            chance * float(rule_at(target, draft, chain)[0] @ torch.arange(4.0).double())
            for chain, chance in chains(draft, 3)
        )
        gains.append(kept - sum(chance * token_by_token(target, draft, chain) for chain, chance in chains(draft, 3)))
    assert min(gains) > -1e-12
    assert sum(gains) / len(gains) > 0.01


def test_equal_models_keep_the_whole_chain_and_one_token_has_the_textbook_chance() -> None:
    same = Laws(3, 4)
    ends_N, rest_NV = rule_at(same, same, (1, 2, 0))
    torch.testing.assert_close(ends_N, torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64), rtol=0.0, atol=1e-9)
    torch.testing.assert_close(rest_NV[3], same((1, 2, 0)))
    target_BNV, draft_BNV = torch.tensor([[[0.5, 0.5]] * 2]), torch.tensor([[[0.75, 0.25], [0.0, 0.0]]])
    keep_BN, rest_BNV = block_law(torch.tensor([[ROOT, 0]]), target_BNV, draft_BNV)
    assert keep_BN[0].tolist() == pytest.approx([1.0, 2 / 3])
    assert rest_BNV[0, 0].tolist() == [0.0, 0.25]


def test_the_walk_ends_where_the_last_draw_keeps_the_prefix_and_passes_over_padding() -> None:
    """Row 0 drafted three tokens, row 1 only one before its early stop."""
    target, draft = Laws(4, 3), Laws(5, 3)
    chains_BD = torch.tensor([[0, 2, 0], [1, 0, 0]])
    laws_BNV = torch.stack([torch.stack([target(tuple(chain[:i])) for i in range(4)]) for chain in chains_BD.tolist()])
    draft_BDV = torch.stack([torch.stack([draft(tuple(chain[:i])) for i in range(3)]) for chain in chains_BD.tolist()])
    draft_BDV = (draft_BDV + laws_BNV[:, :3]) / 2
    draft_BDV[1, 1:] = 0.0
    tree = DraftTree(
        torch.cat([torch.full((2, 1), ROOT), chains_BD], dim=1),
        torch.tensor([[-1, 0, 1, 2], [-1, 0, 0, 0]]),
        torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]),
        torch.tensor([[True] * 4, [True, True, False, False]]),
        3,
        draft_probs_BMV=draft_BDV,
    )
    keep_BN, _ = block_law(tree.tokens_BN, laws_BNV, torch.cat([draft_BDV, torch.zeros(2, 1, 3)], dim=1))
    assert keep_BN[1, 2:].tolist() == [0.0, 0.0]
    seen = set()
    for number in range(80):
        keys_BU = keys_at(torch.tensor([[number], [number]]), torch.arange(4))
        steps = block_walk(tree, laws_BNV, keys_BU)
        for row in range(2):
            stays = [i for i in range(1, 4) if float(uniforms(keys_BU[row, i - 1])) < float(keep_BN[row, i])]
            last = max(stays, default=0)
            assert int(steps.counts_B[row]) == last + 1
            assert steps.path_BE[row].tolist() == [*range(last + 1), *[0] * (3 - last)]
            assert steps.emitted_BE[row, :last].tolist() == chains_BD[row, :last].tolist()
            seen.add((row, last))
    assert seen == {(0, 1), (0, 3), (1, 0), (1, 1)}


def test_block_verification_is_for_chains() -> None:
    with pytest.raises(ValueError, match=r"children is \(2, 1\), and block verification is for chains; give 1"):
        SampledChildren((2, 1), "block")
