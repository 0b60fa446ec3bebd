"""What little text is worth: the replay from a cache against real decoding."""

from __future__ import annotations

import pytest
import torch
from doubles import random_target
from heads import shaken
from tuning import SAMPLES

from benchmarks.learning.replay import acceptance, record_cached
from draftsmith.data.shards.shards import CachedSample
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.tune.recording import record
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.models import Drafter, DraftLimits, Eagle, ReDrafter, Target
from draftsmith.models.target.target import PRE_NORM

LIMITS = DraftLimits(3, 4, node_budget=8)
REQUEST = GenerationSettings(max_new_tokens=16)


@pytest.fixture(scope="module")
def model() -> Target:
    return random_target()


def drafter_of(model: Target, kind: str) -> Drafter:
    if kind == "eagle":
        return shaken(Eagle.for_target(model.ends))
    torch.manual_seed(0)
    return ReDrafter.for_target(model.ends, num_draft_steps=4)


def cached(model: Target, lengths: dict[int, int], request: GenerationSettings = REQUEST) -> list[CachedSample]:
    """Replies with their states; `lengths` cuts some of them short."""
    prompts = [list(sample.prompt_ids) for sample in SAMPLES]
    samples = []
    for number, reply in enumerate(Engine(model).generate(prompts, request)):
        ids = torch.tensor([*prompts[number], *reply.token_ids[: lengths.get(number)]])
        states = model.prefix(ids[None], (PRE_NORM,)).feature(PRE_NORM)[0]
        mask = torch.arange(len(ids)) >= len(prompts[number])
        samples.append(CachedSample(str(number), ids, mask, {PRE_NORM: states}, None))
    return samples


@pytest.mark.parametrize("kind", ["eagle", "redrafter"])
@torch.inference_mode()
def test_a_cache_of_greedy_replies_tells_what_real_decoding_accepts(model: Target, kind: str) -> None:
    drafter = drafter_of(model, kind)
    replayed = record_cached(drafter.bound(model.ends), cached(model, {}), LIMITS, batch_size=3)
    real = record(model, drafter, SAMPLES, REQUEST, widths=[LIMITS.beam_width], depth=LIMITS.draft_length)
    for ours, engines in zip(replayed, real, strict=True):
        assert ours.token_ids == engines.token_ids
        assert (ours.ranks[3] == engines.ranks[3]).all()
    assert acceptance(replayed, LIMITS) == acceptance(real, LIMITS)
    assert acceptance(replayed, LIMITS).positions == sum(len(reply.token_ids) - 1 for reply in real)


@torch.inference_mode()
def test_sampled_replies_take_the_cycles_of_the_engine(model: Target) -> None:
    request = GenerationSettings(max_new_tokens=8, temperature=1.0, seed=3)
    drafter = drafter_of(model, "redrafter")
    replayed = record_cached(drafter.bound(model.ends), cached(model, {}, request), LIMITS)
    real = Engine(model, drafter, LIMITS).generate([list(sample.prompt_ids) for sample in SAMPLES], request)
    for ours, engines in zip(replayed, real, strict=True):
        assert ours.token_ids == tuple(engines.token_ids)
        assert replay(ours, LIMITS).accepted == tuple(engines.accepted)


@torch.inference_mode()
def test_a_reply_that_ends_early_changes_nothing_of_the_others(model: Target) -> None:
    drafter = drafter_of(model, "eagle").bound(model.ends)
    whole = record_cached(drafter, cached(model, {}), LIMITS, batch_size=8)
    short = record_cached(drafter, cached(model, {1: 3}), LIMITS, batch_size=8)
    assert short[1].num_positions == 2
    for number in range(len(SAMPLES)):
        kept = short[number].num_positions
        assert (short[number].ranks[3][: kept - 2] == whole[number].ranks[3][: kept - 2]).all()


def test_a_sample_of_two_replies_is_refused(model: Target) -> None:
    sample = cached(model, {})[0]
    mask = sample.loss_mask.clone()
    mask[1] = True
    with pytest.raises(ValueError, match="a prompt and one reply"):
        record_cached(
            drafter_of(model, "redrafter"),
            [CachedSample("x", sample.input_ids, mask, dict(sample.hidden), None)],
            LIMITS,
        )
