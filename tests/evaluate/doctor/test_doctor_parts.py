"""The doctor's parts by themselves: the search for n-grams against brute force, index shifts by hand, both forms of every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from every_family import EVERY_FAMILY, assert_equal_logits, fresh, name_of
from heads import deep_target, eagle
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.doctor import serving
from draftsmith.evaluate.doctor.acceptance import replay
from draftsmith.evaluate.doctor.alignment import shift_labels, shift_states
from draftsmith.evaluate.doctor.case import Case, NotChecked, draw
from draftsmith.evaluate.doctor.overlap import ngrams_of, read_text, rolling_hashes
from draftsmith.evaluate.doctor.report import Finding, findings_table, summary
from draftsmith.evaluate.doctor.serving import roots_of, served_logits, trained_logits
from draftsmith.evaluate.doctor.states import _overlap, relative
from draftsmith.evaluate.records import Sample
from draftsmith.models import Family, Target
from draftsmith.models.drafters.rollout import PackedBatch, data_rollout
from draftsmith.models.families.block import BlockDrafter, BlockFamily
from draftsmith.models.families.block.block_draft import BlockDraft
from draftsmith.models.families.eagle_base import FeatureDraft
from draftsmith.models.families.riders.rider_drafter import RiderFamily

token_lists = st.lists(st.integers(0, 3), max_size=12)


def prompt(name: str, ids: list[int]) -> Sample:
    return Sample(name, "s", tuple(ids))


def text(rows: list[list[int]]) -> list[tuple[str, np.ndarray]]:
    return [(f"t{number}", np.array(row, dtype=np.int64)) for number, row in enumerate(rows)]


def windows(ids: list[int], size: int) -> set[tuple[int, ...]]:
    return {tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)}


# ---- n-grams


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(token_lists, min_size=1, max_size=4),
    rows=st.lists(token_lists, max_size=5),
    size=st.integers(1, 4),
    block_tokens=st.integers(1, 30),
)
def test_the_stream_finds_what_brute_force_finds(
    prompts: list[list[int]], rows: list[list[int]], size: int, block_tokens: int
) -> None:
    wanted = ngrams_of([prompt(f"p{number}", ids) for number, ids in enumerate(prompts)], size)
    read = read_text(text(rows), wanted, block_tokens)
    found = {ngram for ngram, hit in zip(wanted.texts, read.occurs, strict=True) if hit}
    everything = set().union(*(windows(row, size) for row in rows)) if rows else set()
    assert found == set(wanted.texts) & everything
    for which, name in read.example.items():
        assert wanted.texts[which] in windows(rows[int(name[1:])], size)
    assert read.num_tokens == sum(map(len, rows))
    assert read.num_repeated == len(rows) - len({tuple(row) for row in rows})


def test_a_window_over_two_samples_is_in_neither() -> None:
    wanted = ngrams_of([prompt("p", [1, 2, 3, 4])], 4)
    assert not read_text(text([[1, 2], [3, 4]]), wanted).occurs.any()
    assert read_text(text([[9], [0, 1, 2, 3, 4, 5]]), wanted).example == {0: "t1"}


def test_what_many_prompts_share_is_their_template_and_does_not_count() -> None:
    template = [90, 91, 92]
    wanted = ngrams_of([prompt(f"p{number}", [*template, number]) for number in range(5)], 3)
    assert (90, 91, 92) not in wanted.texts
    assert wanted.num_common == 1
    assert wanted.counts == (1, 1, 1, 1, 1)  # 91, 92 and the prompt's own token


def test_equal_windows_have_equal_hashes_and_others_differ() -> None:
    hashes = rolling_hashes(np.array([1, 2, 3, 1, 2, 3, 2, 1]), 3)
    assert len(hashes) == 6
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 5
    assert len(rolling_hashes(np.array([1, 2]), 3)) == 0


# ---- shifts


def packed(num_tokens: int, hidden_size: int, layers: tuple[str, ...], vocab: int = 300) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    return PackedBatch(
        input_ids=torch.randint(vocab, (num_tokens,), generator=generator),
        loss_mask=torch.arange(num_tokens) >= 4,
        document_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.arange(num_tokens),
        hidden={name: torch.randn(num_tokens, hidden_size, generator=generator) for name in layers},
    )


def test_labels_move_by_one_token() -> None:
    batch = packed(9, 2, ("x",))
    rollout = data_rollout(batch, 1)
    assert rollout.anchors.tolist() == [3, 4, 5, 6, 7]
    assert shift_labels(batch, rollout, -1).tolist() == batch.input_ids[4:9].tolist()
    assert shift_labels(batch, rollout, 0).tolist()[:-1] == rollout.targets[:-1, 0].tolist()
    assert shift_labels(batch, rollout, 1).tolist()[:3] == batch.input_ids[6:9].tolist()


def test_states_move_by_one_token() -> None:
    batch = packed(5, 1, ("x",))
    states = batch.hidden["x"]
    assert torch.equal(shift_states(batch, 1).hidden["x"][:4], states[1:])
    assert torch.equal(shift_states(batch, -1).hidden["x"][1:], states[:4])


def test_where_two_rows_of_states_overlap() -> None:
    row = list(range(4))
    assert [row[part] for part in _overlap(4, 1)] == [[0, 1, 2], [1, 2, 3]]
    assert [row[part] for part in _overlap(4, -1)] == [[1, 2, 3], [0, 1, 2]]
    assert float(relative(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]]))) == pytest.approx(0.5)


# ---- both forms of every family


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)
def test_decoding_says_what_training_said(target: Target, family: Family) -> None:
    drafter = fresh(family, target.ends, torch.arange(1, target.ends.vocab_size, 3), num_steps=4)
    batch = packed(40, target.ends.hidden_size, drafter.features, target.ends.vocab_size)
    roots = roots_of(batch.loss_mask, 4)
    trained, served = trained_logits(drafter, batch, roots, 4), served_logits(drafter, batch, roots, 4)
    assert trained.shape == (3, 4, drafter.config.num_draft_tokens)
    assert_equal_logits(served, trained)
    with torch.no_grad():  # and the comparison sees a change
        next(iter(drafter.parameters())).mul_(1.5)
    assert not torch.allclose(served_logits(drafter, batch, roots, 4), trained, atol=1e-3)


@pytest.mark.parametrize("reads_above", [True, False])
def test_a_family_whose_tree_differs_from_its_chains_is_found_out(
    target: Target, reads_above: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = eagle(target.ends)
    batch = packed(40, target.ends.hidden_size, drafter.features, target.ends.vocab_size)
    good = FeatureDraft.extend
    if not reads_above:
        monkeypatch.setattr(FeatureDraft, "extend", lambda self, new, above: good(self, new, torch.zeros_like(above)))
    monkeypatch.setattr(serving, "pack", lambda *_: batch)
    case = SimpleNamespace(trainable=drafter, trained=drafter, drafter=drafter, samples=[batch], ends=target.ends)
    finding = serving.check_serving(case)  # type: ignore[arg-type]
    assert finding.figures["agreement"] == 1.0, "chains agree either way"
    assert finding.verdict == ("ok" if reads_above else "fault")
    assert ("above_BM" in finding.remedy) == (not reads_above)


def test_a_drafter_that_scores_a_few_tokens_of_each_place_is_compared(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = BlockFamily(correction="selector").build(target.ends, None, 3, "").eval()
    other = BlockFamily(correction="selector").build(target.ends, None, 3, "").eval()
    batch = packed(40, target.ends.hidden_size, drafter.features, target.ends.vocab_size)
    monkeypatch.setattr(serving, "pack", lambda *_: batch)
    roots = roots_of(batch.loss_mask, 3)
    assert (served_logits(drafter, batch, roots, 3) == -torch.inf).any(), "it drafts some tokens alone"
    for served, verdict in ((drafter, "ok"), (other, "fault")):
        case = SimpleNamespace(trainable=drafter, trained=drafter, drafter=served, samples=[batch], ends=target.ends)
        finding = serving.check_serving(case)  # type: ignore[arg-type]
        assert finding.verdict == verdict
        assert not any(np.isnan(list(finding.figures.values())))
        assert np.isinf(finding.figures["relative difference"]) == (served is other)
    assert finding.figures["agreement"] < 1.0


def test_ties_for_the_last_candidate_that_rounding_turns_are_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU rounds the two forms differently. Each two tokens have the same row of the head here, so an odd number of candidates ties."""
    target = deep_target()
    with torch.no_grad():
        weight = target.ends.head_weight
        weight[1::2] = weight[::2]
    settings = {"correction": "selector", "convolution": True, "candidates": 5, "mask_token_id": 63}
    drafter = BlockDrafter.for_target(target.ends, layers=["layer.1.output"], num_draft_steps=3, **settings).eval()
    batch = packed(40, target.ends.hidden_size, drafter.features, target.ends.vocab_size)
    monkeypatch.setattr(serving, "pack", lambda *_: batch)
    exact, generator = BlockDraft.slot_logits, torch.Generator().manual_seed(0)
    case: Any = SimpleNamespace(trainable=drafter, trained=drafter, drafter=drafter, samples=[batch], ends=target.ends)

    def rounded(draft: BlockDraft, size: float) -> torch.Tensor:
        logits = exact(draft)
        return logits + size * torch.randn(logits.shape, generator=generator)

    monkeypatch.setattr(BlockDraft, "slot_logits", lambda draft: rounded(draft, 1e-6))
    roots = roots_of(batch.loss_mask, 3)
    before, after = (form(drafter, batch, roots, 3) for form in (trained_logits, served_logits))
    assert ((before == -torch.inf) != (after == -torch.inf)).any(), "the forms draft different tokens"
    compared = serving.compare_forms(case)
    assert compared.relative < 1e-3
    monkeypatch.setattr(BlockDraft, "slot_logits", lambda draft: rounded(draft, 1.0))
    assert serving.compare_forms(case).relative > 0.01


def test_rows_of_zeros_are_counted_apart_from_padding(target: Target) -> None:
    drafter = eagle(target.ends)
    with torch.no_grad():
        drafter.fc.weight[[2, 5]] = 0.0
    assert serving._rows_of_zeros(drafter, 64) == {"fc.weight": 2}


def test_riders_are_not_checked_on_the_ends_alone(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter: Any = RiderFamily().build(target.ends, None, 3, "")
    anything: Any = SimpleNamespace()
    case = Case(anything, drafter, drafter, target.ends, None, anything, cache=anything)
    assert case.trainable is drafter
    monkeypatch.setattr(target.ends, "trunk", None)
    with pytest.raises(NotChecked, match="leave --ends-only and --device-map out"):
        _ = case.trainable


def test_roots_are_labelled_and_have_room_on_both_sides() -> None:
    assert roots_of(torch.tensor([False] * 2 + [True] * 8), 2) == [2, 4, 7]
    assert roots_of(torch.ones(4, dtype=torch.bool), 2) == [1]
    assert roots_of(torch.ones(3, dtype=torch.bool), 2) == []


def test_a_replay_counts_the_tokens_of_each_cycle() -> None:
    correct = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]]).bool()
    assert replay(correct) == (4, 3)
    assert replay(torch.ones(6, 2).bool()) == (6, 2)
    assert replay(torch.zeros(5, 3).bool()) == (5, 5)
    assert replay(torch.zeros(0, 3).bool()) == (0, 0)


# ---- drawing and reporting


class _Cache:
    """As much of a cache as is drawn from."""

    path = Path("here")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> CachedSample:
        ids = torch.full((3000,), index)
        return CachedSample(str(index), ids, ids > 0, {"x": ids[:, None].float()}, None)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 60), count=st.integers(1, 70), seed=st.integers(0, 5))
def test_draws_are_distinct_in_order_and_repeatable(size: int, count: int, seed: int) -> None:
    drawn = draw(_Cache(size), count, seed)  # type: ignore[arg-type]
    places = [int(sample.id) for sample in drawn]
    assert places == sorted(set(places))
    assert len(places) == min(size, count)
    assert [sample.id for sample in draw(_Cache(size), count, seed)] == [sample.id for sample in drawn]  # type: ignore[arg-type]
    assert all(len(sample.input_ids) == len(sample.hidden["x"]) == 2048 for sample in drawn)


def test_a_finding_that_is_no_ok_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="without a remedy"):
        Finding("labels", "fault", "3%")


def test_the_summary_names_what_is_wrong() -> None:
    wrong = [Finding(name, "fault", "1", "2", "mend it") for name in ("a", "b")]
    odd = [Finding("c", "warning", "1", "2", "look"), Finding("d", "ok", "1"), Finding("e", "not checked", "why")]
    assert summary([*wrong, *odd]) == "2 faults (a, b), 1 warning (c), 1 ok, 1 not checked"
    assert findings_table([*wrong, *odd]) is not None
