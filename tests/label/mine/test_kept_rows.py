"""Rows that keep keys and values: what they say equals a whole forward, wherever a text leaves the one read before."""

import random

import pytest
import torch
from doubles import VOCAB, random_target
from recurrent_models import recurrent_model
from transformers.cache_utils import DynamicCache

from draftsmith.label.mine.kept_rows import CachedRows, RowInput, RowOutput
from draftsmith.label.mine.state_rows import MOST_COPIES, thinned
from draftsmith.models.target.target import Target

LONGEST = 60


def by_hand(target: Target, read: RowInput) -> list[int]:
    """By the model's own forward over the whole text."""
    logits = target.model(input_ids=torch.tensor([read.tokens]), use_cache=False).logits[0]
    return logits[-read.num_asked :].argmax(-1).tolist()


def edited(tokens: list[int], rng: random.Random) -> list[int]:
    """A text that leaves `tokens` somewhere."""
    kept = tokens[: rng.randint(0, len(tokens))]
    return kept + [rng.randrange(VOCAB) for _ in range(rng.randint(1, max(1, min(20, LONGEST - len(kept)))))]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize("chunk", [256, 8])
def test_any_rows_in_any_order_of_edits_say_what_a_whole_forward_says(family: str, chunk: int) -> None:
    target, rng = random_target(family), random.Random(1)
    rows = CachedRows(target, 3, LONGEST, chunk=chunk)
    texts: list[list[int]] = [[] for _ in range(3)]
    for _ in range(25):
        chosen = rng.sample(range(3), rng.randint(1, 3))
        for row in chosen:
            texts[row] = edited(texts[row], rng)[:LONGEST]
        reads = [RowInput(row, texts[row], rng.randint(1, min(6, len(texts[row])))) for row in chosen]
        found = rows.read(reads)
        assert set(found) == set(chosen)
        for read in reads:
            assert found[read.row].next_tokens == by_hand(target, read)


def test_only_what_is_behind_the_common_beginning_is_read() -> None:
    rows = CachedRows(random_target(), 1, LONGEST)
    text = list(range(10, 30))
    assert rows.read([RowInput(0, text, 1)])[0].num_tokens == 20
    assert rows.read([RowInput(0, [*text, 5, 6], 1)])[0].num_tokens == 2
    assert rows.read([RowInput(0, [*text[:12], 5, 6, 7], 2)])[0].num_tokens == 3
    assert rows.read([RowInput(0, text[:12], 4)])[0].num_tokens == 4
    assert (rows.num_forwards, rows.num_tokens, rows.num_padding) == (4, 29, 0)


def test_chunks_bound_a_forward_and_are_counted() -> None:
    target = random_target()
    widths: list[int] = []
    target.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rows = CachedRows(target, 1, LONGEST, chunk=8)
    reading = rows.read([RowInput(0, list(range(20)), 6)])[0]
    assert widths == [8, 6, 6]
    assert reading == RowOutput(reading.next_tokens, 20, 3)
    assert rows.num_forwards == 3


def test_a_draft_chooses_among_the_targets_tokens_and_embeds_no_other() -> None:
    target = random_target()
    rows = CachedRows(target, 1, LONGEST, vocab_size=7)
    [reading] = rows.read([RowInput(0, [3, VOCAB + 5], 2)]).values()
    logits = target.model(input_ids=torch.tensor([[3, VOCAB - 1]])).logits[0, :, :7]
    assert reading.next_tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("name", "chunk"), [("Lfm2", 256), ("NemotronH", 8), ("Jamba", 8)])
def test_a_recurrent_state_goes_back_to_any_edit(name: str, chunk: int) -> None:
    target, rng = Target.from_model(recurrent_model(name), f"tiny-{name}"), random.Random(2)
    rows = CachedRows(target, 2, LONGEST, chunk=chunk)
    texts: list[list[int]] = [[], []]
    for _ in range(6):
        chosen = rng.sample(range(2), rng.randint(1, 2))
        for row in chosen:
            texts[row] = edited(texts[row], rng)[:LONGEST]
        reads = [RowInput(row, texts[row], rng.randint(1, min(6, len(texts[row])))) for row in chosen]
        outputs = rows.read(reads)
        for read in reads:
            assert outputs[read.row].next_tokens == by_hand(target, read)


def test_a_recurrent_state_reads_again_from_the_last_copy_before_an_edit() -> None:
    rows = CachedRows(Target.from_model(recurrent_model("Lfm2"), "tiny-Lfm2"), 1, LONGEST)
    text = list(range(10, 30))
    assert rows.read([RowInput(0, text, 4)])[0].num_tokens == 20  # copies after 16 and after 20 tokens
    assert rows.read([RowInput(0, [*text, 5], 1)])[0].num_tokens == 1
    assert rows.read([RowInput(0, [*text[:18], 5, 6], 2)])[0].num_tokens == 4
    assert rows.read([RowInput(0, [*text[:12], 5], 1)])[0].num_tokens == 13
    assert (rows.num_tokens, rows.num_padding) == (38, 0)


def test_the_copy_between_the_closest_others_goes_first() -> None:
    places = [0, 20, 40, 50, 53, 70, 90, 120, 140]
    assert len(places) == MOST_COPIES + 1
    kept = thinned([(place, DynamicCache()) for place in places])
    assert [place for place, _ in kept] == [0, 20, 40, 53, 70, 90, 120, 140]
