"""Back-off tables: probabilities against the formula in plain Python, sums to one, contexts that are followed, and their folder."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.ngrams.table import NgramTable, load_ngrams

Gram = tuple[int, ...]


class ByHand:
    """Interpolated modified Kneser-Ney, one dictionary an order."""

    def __init__(self, sequences: list[list[int]], vocab: int, order: int) -> None:
        self.vocab, self.order = vocab, order
        raw = [
            Counter(tuple(text[i : i + n]) for text in sequences for i in range(len(text) - n + 1))
            for n in range(1, order + 1)
        ]
        self.counts: list[dict[Gram, int]] = []
        for n in range(1, order + 1):
            if n == order:
                self.counts.append(dict(raw[n - 1]))
                continue
            before = Counter(gram[1:] for gram in raw[n])
            self.counts.append({gram: before.get(gram, count) for gram, count in raw[n - 1].items()})
        self.discounts = [self._discounts(list(counts.values())) for counts in self.counts]

    @staticmethod
    def _discounts(counts: list[int]) -> list[float]:
        n = [sum(count == j for count in counts) for j in (1, 2, 3, 4)]
        if min(n[:3]) == 0:
            return [0.5, 1.0, 1.5]
        share = n[0] / (n[0] + 2 * n[1])
        found = [j - (j + 1) * share * n[j] / n[j - 1] for j in (1, 2, 3)]
        return [value if 0 < value <= j else (0.5, 1.0, 1.5)[j - 1] for j, value in enumerate(found, 1)]

    def prob(self, context: Gram, token: int) -> float:
        context = context[-(self.order - 1) :] if self.order > 1 else ()
        n = len(context) + 1
        shorter = self.prob(context[1:], token) if n > 1 else 1 / self.vocab
        followers = {gram: count for gram, count in self.counts[n - 1].items() if gram[:-1] == context}
        total = sum(followers.values())
        if total == 0:
            return shorter
        discount = [self.discounts[n - 1][min(count, 3) - 1] for count in followers.values()]
        weight = sum(min(d, count) for d, count in zip(discount, followers.values(), strict=True)) / total
        own = followers.get((*context, token), 0)
        share = max(own - self.discounts[n - 1][min(own, 3) - 1], 0) / total if own else 0.0
        return share + weight * shorter


texts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=14), min_size=1, max_size=6)


def contexts_of(table: NgramTable, order: int, vocab: int) -> list[Gram]:
    grams: list[Gram] = [()]
    for _ in range(order - 1):
        grams += [(*gram, token) for gram in grams for token in range(vocab)]
    return list(dict.fromkeys(grams))


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(1, 3))
def test_probabilities_are_those_of_the_formula(sequences: list[list[int]], order: int) -> None:
    vocab = 6
    table, by_hand = kneser_ney(sequences, vocab, order), ByHand(sequences, vocab, order)
    for gram in contexts_of(table, order, vocab):
        context = table.context_of(torch.tensor([list(gram) or [-1]]))
        scores = table.log_prob(context, torch.arange(vocab)).exp().tolist()
        assert scores == pytest.approx([by_hand.prob(gram, token) for token in range(vocab)], rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(1, 4), st.integers(1, 3))
def test_every_context_gives_a_distribution_also_when_rare_n_grams_are_left_out(
    sequences: list[list[int]], order: int, least_count: int
) -> None:
    table = kneser_ney(sequences, 7, order, least_count)
    contexts_C1 = torch.arange(table.links_C.shape[0])[table.orders_C < order][:, None]
    sums = table.log_prob(contexts_C1, torch.arange(7)[None]).exp().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(2, 4), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_a_context_is_followed_to_its_longest_known_end(
    sequences: list[list[int]], order: int, text: list[int]
) -> None:
    known: dict[int, set[Gram]] = defaultdict(set)
    for sequence in sequences:
        for n in range(1, order + 1):
            known[n] |= {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}
    table = kneser_ney(sequences, 6, order)
    context = torch.zeros(1, dtype=torch.int64)
    for end in range(1, len(text) + 1):
        context = table.follow(context, torch.tensor([text[end - 1]]))
        longest = next((n for n in range(min(order - 1, end), 0, -1) if tuple(text[end - n : end]) in known[n]), 0)
        assert int(table.orders_C[context]) == longest


def test_a_negative_token_empties_the_context_and_shapes_broadcast() -> None:
    table = kneser_ney([[0, 1, 2, 0, 1, 3]], 4, 3)
    assert table.context_of(torch.tensor([[0, 1], [0, -1]])).tolist()[1] == 0
    scores = table.log_prob(torch.tensor([[0], [1]]), torch.arange(4))
    assert scores.shape == (2, 4)
    assert math.isclose(float(scores[0].exp().sum()), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("sequences", "order", "fault"),
    [
        ([], 2, "no tokens to count"),
        ([[0, 9]], 2, "the vocabulary has 4 tokens"),
        ([[0]], 0, "both must be at least 1"),
    ],
)
def test_texts_that_cannot_be_counted_are_errors(sequences: list[list[int]], order: int, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        kneser_ney(sequences, 4, order)


def test_a_folder_gives_the_same_table_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    table = kneser_ney([[0, 1, 2, 0, 1, 3], [3, 1]], 4, 3, tokenizer_fingerprint="abc")
    table.save(tmp_path)
    again = load_ngrams(tmp_path)
    assert (again.order, again.vocab_size, again.tokenizer_fingerprint) == (3, 4, "abc")
    for name in ("keys_G", "log_probs_G", "backoffs_C", "links_C", "orders_C"):
        assert torch.equal(getattr(again, name), getattr(table, name))
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    for name, broken, fault in (
        ("keys", whole["keys"].flip(0), "keys that do not increase"),
        ("log_probs", whole["log_probs"] * torch.nan, "NaN or infinity"),
        ("backoffs", whole["backoffs"][1:], "missing or of other lengths"),
        ("links", whole["links"] * 0 + 1, "links to contexts"),
        ("orders", whole["orders"].int(), "not int64"),
        ("keys", whole["keys"] + 400, "come behind them"),
    ):
        save_file({**whole, name: broken.contiguous()}, weights)
        with pytest.raises(ValueError, match=fault):
            load_ngrams(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is cut off or no safetensors file: .*make the table again"
    ):
        load_ngrams(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors does not exist; make the table again"):
        load_ngrams(tmp_path)
    with pytest.raises(ValueError, match="holds no n-gram table"):
        load_ngrams(tmp_path / "nothing")
