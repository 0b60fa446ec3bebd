"""Smaller draft vocabularies: the cut of a record by hand, the bound against the engine's own cycles, the bytes, the words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import random_target
from torch import Tensor
from tuning import SAMPLES, NoisyExpander, NoisyOracle, flat_costs

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.strata.acceptance import tokens_per_step
from draftsmith.evaluate.tune.recording import NOWHERE, Recorded, record
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.evaluate.tune.vocabularies import (
    VocabularyOutcome,
    best_vocabulary,
    cut,
    draft_share,
    most_frequent_of,
    vocabulary_table,
    weigh_vocabularies,
)
from draftsmith.models import Cycle, DraftLimits, ReDrafter
from draftsmith.models.tree.search import Expander
from draftsmith.models.tree.shapes import parse_shape


def test_a_vocabulary_keeps_the_most_frequent_of_the_drafters_own_tokens() -> None:
    counts_V = np.array([9, 0, 7, 5, 0])
    assert most_frequent_of(np.array([1, 3, 4]), counts_V, 2).tolist() == [False, True, False, True, False]
    assert most_frequent_of(np.array([1, 2, 3]), counts_V, 1).tolist() == [False, False, True, False, False]


def test_a_draft_ends_where_the_reply_goes_on_with_a_token_outside() -> None:
    ahead = {1: np.zeros((3, 2, 2), dtype=np.int32)}
    reply = Recorded((0,), (5, 6, 7, 8), ahead, {1: np.zeros((3, 2), dtype=np.int32)})
    kept_mask_V = np.array([token != 7 for token in range(10)])
    smaller = cut(reply, kept_mask_V)
    assert smaller.ranks[1].tolist() == [[0, -1], [-1, -1], [0, 0]]  # behind 5: 6, not 7; behind 6: not 7; behind 7: 8
    assert (smaller.ahead[1][:, :, 0] == NOWHERE).tolist() == [[False, True], [True, True], [False, False]]
    assert ahead[1].max() == 0, "the record itself was changed"


class CutOracle(NoisyOracle):
    """An oracle that cannot propose some tokens."""

    kept_mask_V: Tensor

    def expander(self, state, cycle: Cycle, limits: DraftLimits) -> Expander:  # type: ignore[no-untyped-def, override]
        expander = NoisyExpander(self.target, self.noise, state.texts)
        scored = expander._logits
        expander._logits = lambda texts: scored(texts).masked_fill(~self.kept_mask_V, -1e4)  # type: ignore[method-assign]
        return expander


@pytest.mark.parametrize("shape", ["1x3", "2x3n4"])
def test_tokens_per_step_are_a_lower_bound_of_what_a_drafter_with_that_vocabulary_gives(shape: str) -> None:
    target, limits = random_target(), parse_shape(shape)
    request = GenerationSettings(max_new_tokens=16)
    with torch.inference_mode():
        replies = record(target, NoisyOracle(target), SAMPLES, request, widths=(1, 2), depth=3, batch_size=4)
        tokens = np.array([token for reply in replies for token in reply.token_ids])
        counts_V = np.bincount(tokens, minlength=target.ends.vocab_size)
        kept_mask_V = most_frequent_of(np.arange(len(counts_V)), counts_V, len(np.unique(tokens)) // 2)
        oracle = CutOracle(target)
        oracle.kept_mask_V = torch.from_numpy(kept_mask_V)
        prompts = [list(sample.prompt_ids) for sample in SAMPLES]
        real = Engine(target, oracle, limits).generate(prompts, request)
    steps = sum(len(generation.token_ids) - 1 for generation in real) / sum(
        len(generation.accepted) for generation in real
    )
    bound = tokens_per_step([replay(cut(reply, kept_mask_V), limits) for reply in replies])
    whole = tokens_per_step([replay(reply, limits) for reply in replies])
    assert bound is not None
    assert whole is not None
    assert bound <= steps + 1e-9
    assert 1.0 <= bound < whole


def drafter_of(vocab_size: int) -> ReDrafter:
    target = random_target()
    assert target.ends.vocab_size == vocab_size
    return ReDrafter.for_target(target.ends, num_draft_steps=3)


def test_the_bytes_of_a_draft_fall_with_the_rows_of_its_head() -> None:
    drafter = drafter_of(random_target().ends.vocab_size)
    limits = DraftLimits(1, 3, None)
    assert draft_share(drafter, limits, 1.0) == 1.0
    half, quarter = draft_share(drafter, limits, 0.5), draft_share(drafter, limits, 0.25)
    assert 0.0 < quarter < half < 1.0
    assert quarter == pytest.approx(1.0 - 1.5 * (1.0 - half))


def test_the_drafters_own_vocabulary_is_weighed_against_smaller_ones_and_the_best_is_named() -> None:
    target = random_target()
    vocab_size = target.ends.vocab_size
    drafter, limits = drafter_of(vocab_size), DraftLimits(1, 3, None)
    with torch.inference_mode():
        replies = record(
            target, NoisyOracle(target, 0.0), SAMPLES, GenerationSettings(max_new_tokens=16), widths=(1,), depth=3
        )
    counts_V = np.bincount([token for reply in replies for token in reply.token_ids], minlength=vocab_size)
    distinct = int((counts_V > 0).sum())
    outcomes = weigh_vocabularies(
        replies, drafter, limits, flat_costs([limits]), [1, distinct, vocab_size, 10 * vocab_size], counts_V
    )
    by_size = {outcome.size: outcome for outcome in outcomes}
    assert set(by_size) == {1, distinct, vocab_size}
    own, enough, few = by_size[vocab_size], by_size[distinct], by_size[1]
    assert (own.is_own, enough.is_own) == (True, False)
    assert own.coverage == enough.coverage == 1.0
    assert few.coverage < 1.0
    assert own.tokens_per_step == enough.tokens_per_step > few.tokens_per_step
    assert own.draft_seconds > enough.draft_seconds > few.draft_seconds
    assert outcomes[0] is enough, "all that is accepted, and fewer bytes"
    assert f"draft vocabulary: {distinct:,} tokens are best" in best_vocabulary(outcomes)
    assert vocabulary_table(outcomes).splitlines()[2].startswith(f"| **{distinct:,}** | 100.0 % |")
    halves = {
        outcome.size: outcome
        for outcome in weigh_vocabularies(replies, drafter, limits, flat_costs([limits]), [distinct])
    }
    assert halves[distinct].coverage < 1.0, "the tokens of one half do not hold all of the other's"


def test_a_drafter_whose_own_vocabulary_is_best_is_told_so() -> None:
    own, small = VocabularyOutcome(32, True, 1.0, 3.0, 0.1, 2.0), VocabularyOutcome(8, False, 0.5, 1.5, 0.05, 1.2)
    assert (
        best_vocabulary([own, small]) == "draft vocabulary: its own 32 tokens are best; no smaller one gains (estimate)"
    )


def test_a_vocabulary_of_no_token_is_an_error(tmp_path: Path) -> None:
    from draftsmith.evaluate.tune.tune_command import VocabularyOptions

    with pytest.raises(ValueError, match="at least 1 token"):
        VocabularyOptions(vocabularies=(0,))
