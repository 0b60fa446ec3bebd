"""The engine beyond losslessness: stop strings, streaming, refusals, the cache, the ledger, continuations from every position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doubles import BOS, PlannedDrafter, greedy_by_hand, random_target
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from draftsmith.decode import Engine, GenerationSettings, Ledger
from draftsmith.decode.batch import Batch, Request
from draftsmith.decode.cycle import DecodeCycle
from draftsmith.decode.greedy_continuations import greedy_continuations
from draftsmith.decode.ledger import device_clock
from draftsmith.models import DraftLimits, ReDrafter, Target
from draftsmith.models.slots.slot_cache import KeptRows, SlotCache

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 30]]


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def letters() -> PreTrainedTokenizerBase:
    """A tokenizer of 61 one-letter tokens; decoding joins them without spaces."""
    vocabulary = {chr(ord("A") + token): token for token in range(61)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("manner", ["oracle", "random"])
def test_a_stop_string_ends_a_row_at_the_token_that_completes_it(target: Target, manner: str) -> None:
    tokenizer = letters()
    full = greedy_by_hand(target, PROMPTS[0], 16)
    text = "".join(chr(ord("A") + token) for token in full)
    assert tokenizer.decode(full) == text
    stop = text[6:9]
    drafter = PlannedDrafter(target, manner)  # type: ignore[arg-type]
    request = GenerationSettings(max_new_tokens=30, stop_strings=("@@", stop))
    plain = Engine(target, tokenizer=tokenizer).generate(PROMPTS[:1], request)[0]
    drafted = Engine(target, drafter, DraftLimits(3, 4), tokenizer).generate(PROMPTS[:1], request)[0]
    assert plain.token_ids == full[: text.index(stop) + 3]
    assert (drafted.token_ids, drafted.finish) == (plain.token_ids, "stop")


def test_stop_strings_without_a_tokenizer_are_refused(target: Target) -> None:
    with pytest.raises(ValueError, match="give the engine a tokenizer"):
        Engine(target).generate(PROMPTS, GenerationSettings(stop_strings=("x",)))


def test_streamed_tokens_are_the_generation_in_order(target: Target) -> None:
    streamed: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    engine = Engine(target, PlannedDrafter(target, "half"), DraftLimits(3, 4))
    results = engine.generate(
        PROMPTS, GenerationSettings(max_new_tokens=13), lambda row, new: streamed[row].append(new)
    )
    for row, result in enumerate(results):
        assert sum(streamed[row], start=[]) == result.token_ids  # noqa: RUF017
        assert [len(new) for new in streamed[row]][1:] == [accepted + 1 for accepted in result.accepted]
        assert len(streamed[row]) > 2


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [([], "is empty"), ([BOS] * 96, "has 96 tokens, the context .* is 96"), ([BOS, 61], "token id 61, the vocabulary")],
)
def test_prompts_that_cannot_be_decoded_are_refused(target: Target, prompt: list[int], rule: str) -> None:
    with pytest.raises(ValueError, match=f"prompt 1 .*{rule}|prompt 1 holds {rule}"):
        Engine(target).generate([[BOS], prompt], GenerationSettings())


def test_a_drafter_of_another_target_is_refused_by_the_engine(target: Target) -> None:
    other = ReDrafter.for_target(random_target(seed=7).ends)
    with pytest.raises(ValueError, match="was trained for target"):
        Engine(target, other)


def test_no_prompts_give_no_generations(target: Target) -> None:
    assert Engine(target).generate([], GenerationSettings()) == []


def test_cached_keys_equal_recomputed_ones_after_many_cycles(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many cycles of accepting scattered nodes, every cached key is the one that plain decoding computes."""
    caught: list[Batch] = []
    original = DecodeCycle._advance

    def spy(self: DecodeCycle, batch: Batch, *rest: object) -> None:
        original(self, batch, *rest)  # type: ignore[arg-type]
        caught.append(batch)

    monkeypatch.setattr(DecodeCycle, "_advance", spy)
    engine = Engine(target, PlannedDrafter(target, "late"), DraftLimits(3, 4))
    result = engine.generate(PROMPTS[:1], GenerationSettings(max_new_tokens=41))[0]
    length = len(PROMPTS[0]) + len(result.token_ids) - 1
    with torch.inference_mode():
        text = torch.tensor([PROMPTS[0] + result.token_ids[:-1]])
        fresh = target.model(input_ids=text, use_cache=True).past_key_values
    assert sum(result.accepted) > 20
    for layer in range(3):
        keys, values = caught[-1].cache.layer(layer)
        torch.testing.assert_close(keys[:, :, :length], fresh.layers[layer].keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[:, :, :length], fresh.layers[layer].values, rtol=1e-4, atol=1e-4)


def test_the_ledger_charges_every_phase_and_counts_cycles(target: Target) -> None:
    ledger = Ledger()
    engine = Engine(target, ReDrafter.for_target(target.ends), DraftLimits(2, 3), ledger=ledger)
    result = engine.generate(PROMPTS[:1], GenerationSettings(max_new_tokens=9))[0]
    assert set(ledger.seconds) == {"prefill", "draft", "verify", "accept", "host"}
    assert all(seconds > 0 for seconds in ledger.seconds.values())
    assert ledger.cycles == len(result.accepted)
    assert ledger.cycles * 2 <= ledger.nodes <= ledger.cycles * 7


def test_continuations_from_every_position_are_the_targets_own(target: Target) -> None:
    texts = [[BOS, 5, 9, 11, 4, 30], [BOS, 7, 8]]
    padded = torch.tensor([texts[0], texts[1] + [0] * 3])
    greedy = greedy_continuations(target, padded, num_tokens=4)
    assert greedy.shape == (2, 6, 4)
    for row, text in enumerate(texts):
        for end in range(1, len(text) + 1):
            assert greedy[row, end - 1].tolist() == greedy_by_hand(target, text[:end], 4)


def test_retired_rows_leave_holes_that_the_last_rows_fill() -> None:
    for keep, order, holes, movers in (
        ([1, 2, 4], [4, 1, 2], [0], [4]),
        ([0, 1], [0, 1], [], []),
        ([2, 3, 4], [3, 4, 2], [0, 1], [3, 4]),
        ([], [], [], []),
    ):
        kept = KeptRows.of(keep, torch.device("cpu"))
        assert (kept.order, kept.holes, kept.movers, kept.index.tolist()) == (order, holes, movers, order)


def test_layers_of_other_shapes_get_buffers_of_their_own() -> None:
    """Three layers: two alike, one whose keys and values differ in size, as multi-head latent attention has it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, 8), (3, 8, 4), (2, 8, 8)]
    cache = SlotCache(capacity=9, num_layers=3)
    slots = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])
    cache.aim(slots, window=6)
    written = []
    for layer, (heads, of_keys, of_values) in enumerate(shapes):
        keys = torch.randn(2, heads, 4, of_keys, generator=generator)
        values = torch.randn(2, heads, 4, of_values, generator=generator)
        seen_keys, seen_values = cache.update(keys, values, layer)
        assert seen_keys.shape == (2, heads, 6, of_keys)
        assert torch.equal(seen_values[1, :, 2:6], values[1])
        written.append((keys, values))
    cache.move(torch.tensor([[0, 3], [2, 5]]), torch.tensor([[0, 1], [2, 3]]))
    cache.shrink(KeptRows.of([1], torch.device("cpu")))
    for layer, (keys, values) in enumerate(written):
        moved_keys, moved_values = cache.layer(layer)
        assert torch.equal(moved_keys[0, :, 2:4], keys[1][:, [0, 3]])
        assert torch.equal(moved_values[0, :, 2:4], values[1][:, [0, 3]])


def test_consecutive_slots_of_layers_of_any_shape_are_written_as_others_are() -> None:
    """The second layer writes fewer tokens, as one does that riders enter later; then a forward at other slots follows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 8), (2, 3, 8), (3, 4, 4)]
    caches = SlotCache(capacity=9, num_layers=3), SlotCache(capacity=9, num_layers=3)
    for first in (0, 4):
        slots = torch.arange(first, first + 4)[None]
        caches[0].aim(slots, window=first + 4)
        caches[1].aim(slots, window=first + 4, first=first)
        for layer, (heads, num_new, size) in enumerate(shapes):
            keys, values = torch.randn(2, 1, heads, num_new, size, generator=generator)
            expected, seen = (cache.update(keys, values, layer) for cache in caches)
            assert torch.equal(expected[0], seen[0])
            assert torch.equal(expected[1], seen[1])
            assert torch.equal(seen[1][:, :, first : first + num_new], values)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Three CUDA devices, the first without tensors: which were waited for, and which were asked about."""
    calls: dict[str, list[int]] = {"waited": [], "asked": []}

    def allocated(index: int) -> int:
        calls["asked"].append(index)
        return (0, 64, 8)[index]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "synchronize", calls["waited"].append)
    return calls


def test_a_ledger_waits_for_every_device_that_holds_tensors(devices: dict[str, list[int]]) -> None:
    """Not for the current one alone, and not for those that were never touched, where waiting would take memory."""
    with Ledger().phase("draft"):
        assert devices["waited"] == []
    assert devices["waited"] == [1, 2]


def test_a_ledger_and_a_clock_ask_for_the_devices_once_and_no_phase_pays_for_it(devices: dict[str, list[int]]) -> None:
    ledger = Ledger()
    for name in ("prefill", "draft", "verify"):
        asked = list(devices["asked"])
        with ledger.phase(name):
            asked = asked or list(devices["asked"])
            assert asked == [0, 1, 2]
        assert devices["asked"] == asked
    assert devices["waited"] == [1, 2] * 3
    assert ledger == Ledger(dict(ledger.seconds))
    now = device_clock()
    assert now() <= now()
    assert devices == {"asked": [0, 1, 2] * 2, "waited": [1, 2] * 5}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cycle_waits_for_the_device_once() -> None:
    target = random_target()
    target = Target.from_model(target.model.cuda())
    drafter = ReDrafter.for_target(target.ends).cuda()
    engine = Engine(target, drafter, DraftLimits(4, 3, node_budget=6))
    engine.generate(PROMPTS, GenerationSettings(max_new_tokens=4))
    reads = 0
    record = Engine._record

    def allowed(self: Engine, *arguments: Any, **named: Any) -> list[Request]:
        nonlocal reads
        torch.cuda.set_sync_debug_mode("default")
        ended = record(self, *arguments, **named)
        reads += 1
        torch.cuda.set_sync_debug_mode("error")
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_record", allowed)
        try:
            result = engine.generate(PROMPTS[:1], GenerationSettings(max_new_tokens=12))[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert reads == len(result.accepted) + 1
