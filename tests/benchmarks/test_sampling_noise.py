"""What rounding changes: each kept row of logits is that of a reply's token, and a way of decoding is compared with itself as equal."""

from __future__ import annotations

import torch

from benchmarks.decode.sampling_noise import Compared, Recording, Subject, measure, random_target
from draftsmith.decode import GenerationSettings
from draftsmith.models import LMDrafter
from draftsmith.models.tree.shapes import parse_shape

NUM_TOKENS = 6


def subject() -> Subject:
    target = random_target(64, torch.float32)
    return Subject(target.name, target, [[5, 9, 2], [7, 3, 1, 8]], NUM_TOKENS)


def test_the_kept_logits_are_those_that_each_token_is_chosen_by() -> None:
    own = subject()
    settings = GenerationSettings(NUM_TOKENS)
    for engine in (
        Recording(own.target),
        Recording(own.target, LMDrafter(own.target), parse_shape("2x3")),
    ):
        for kept in engine.kept_logits(own.prompts, settings):
            assert len(kept.tokens) == NUM_TOKENS
            chosen = [int(logits.argmax()) for logits in kept.logits]
            assert chosen[: NUM_TOKENS - 1] == kept.tokens[1:]


def test_every_way_is_compared_at_every_position() -> None:
    for compared in measure(subject()).values():
        assert isinstance(compared, Compared)
        assert compared.num_replies == 2
        assert compared.num_changed == 0
        assert len(compared.by_token) == 2 * (NUM_TOKENS - 1)
        assert max(compared.by_token) < 1e-4
