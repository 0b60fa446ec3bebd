"""The best paths through a lattice against all paths, scored one by one."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.ngrams.lattice import best_paths

VOCAB = 6


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(1, 4),
    least_count=st.integers(1, 2),
    length=st.integers(1, 5),
    num_candidates=st.integers(1, 3),
    num_paths=st.integers(1, 7),
    weight=st.sampled_from([0.0, 0.3, 2.0]),
    seed=st.integers(0, 10_000),
)
def test_the_best_paths_are_those_of_all_paths(
    order: int, least_count: int, length: int, num_candidates: int, num_paths: int, weight: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, VOCAB, (4, 12), generator=generator).tolist()
    table = kneser_ney(texts, VOCAB, order, least_count)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:num_candidates] for _ in range(2 * length)]).view(
        2, length, num_candidates
    )
    own = -3.0 * torch.rand(2, length, num_candidates, generator=generator)
    before = torch.randint(0, VOCAB, (2, 3), generator=generator)
    paths, scores = best_paths(table, table.context_of(before), ids, own, weight, num_paths)
    for row in range(2):
        known: dict[tuple[int, ...], float] = {}
        for numbers in product(range(num_candidates), repeat=length):
            history, total = before[row].tolist(), 0.0
            for slot, number in enumerate(numbers):
                token = int(ids[row, slot, number])
                opinion = table.log_prob(table.context_of(torch.tensor([history])), torch.tensor([token]))
                total += float(own[row, slot, number]) + weight * float(opinion)
                history.append(token)
            known[tuple(history[3:])] = total
        best = sorted(known.values(), reverse=True)[:num_paths]
        got = {
            tuple(path): float(score[-1])
            for path, score in zip(paths[row].tolist(), scores[row], strict=True)
            if score[-1] > -torch.inf
        }
        assert len(got) == len(best), "no path is given twice, and none is missing"
        assert list(got.values()) == pytest.approx(best, abs=1e-4)
        for path, total in got.items():
            assert known[path] == pytest.approx(total, abs=1e-4)
    assert (scores[..., 1:] <= scores[..., :-1] + 1e-6).all(), "no prefix scores below its path"
