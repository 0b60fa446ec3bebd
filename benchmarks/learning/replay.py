"""Tokens per step of a drafter on cached replies, without running the target again.

A reply does not depend on the draft: greedy ones never do, and the random numbers of sampled ones belong to places of the reply. So one
cache of replies serves every drafter. Where replies were drawn, the drafts are guesses by the same numbers. Each drafter drafts behind
every token of a reply, from the cached states. The cycles are replayed from that record.

Owns: the pass over a cache. Does not know: how drafters are trained, or what is compared.

Shape legend: B replies of a batch, E pairs of a prompt, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftsmith.data.shards.shards import CachedSample
from draftsmith.decode.sampling import GenerationSettings, process
from draftsmith.evaluate.strata.acceptance import tokens_per_step
from draftsmith.evaluate.tune.recording import Drafted, Recorded, Recording, traced
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.models import Cycle, Drafter, DraftLimits, Emitted, Opening
from draftsmith.models.tree.noise import SharedNoise, keys_from, request_keys

TREE = DraftLimits(10, 5, node_budget=24)


@dataclass(frozen=True)
class Acceptance:
    """What a drafter gains on some replies.

    Attributes:
        top1: share of positions where the drafter's likeliest token is the reply's next one.
        tokens_per_step: tokens emitted a target forward behind the prompt's.
        positions: where a draft was made.
        cycles: target forwards.
    """

    top1: float
    tokens_per_step: float
    positions: int
    cycles: int


@dataclass(frozen=True)
class Drawn:
    """How replies were drawn.

    Attributes:
        settings: of all of them, with a temperature above 0.
        numbers: which noise each one drew, as the engine's request ids.
    """

    settings: GenerationSettings
    numbers: Sequence[int]

    def part(self, start: int, count: int) -> Drawn:
        """Of some replies only."""
        return Drawn(self.settings, self.numbers[start : start + count])

    def noise(self, prompts_B: Tensor) -> SharedNoise:
        """What the target draws with behind the first token of each reply.

        Args:
            prompts_B: int64, tokens of each prompt.
        """
        keys_B = request_keys(self.settings.seed, self.numbers, "choices", prompts_B.device)
        # A reply's first token has the place 0, and the root of the first draft is that token.
        keys_B = keys_from(keys_B, prompts_B - 1)
        return SharedNoise(keys_B, prompts_B, self.settings.temperature, lambda logits: process(logits, self.settings))


def acceptance(replies: Sequence[Recorded], limits: DraftLimits = TREE) -> Acceptance:
    """Pools the record of some replies.

    Args:
        replies: recorded with the width of the limits.
        limits: the shape of the drafts.
    """
    ranks = [reply.ranks[limits.beam_width][:, 0] for reply in replies]
    positions = sum(map(len, ranks))
    decoded = [replay(reply, limits) for reply in replies]
    hits = sum(int((of_reply == 0).sum()) for of_reply in ranks)
    cycles = sum(each.cycles for each in decoded)
    return Acceptance(hits / max(1, positions), tokens_per_step(decoded) or 1.0, positions, cycles)


def record_cached(
    drafter: Drafter,
    samples: Sequence[CachedSample],
    limits: DraftLimits = TREE,
    batch_size: int = 8,
    drawn: Drawn | None = None,
) -> list[Recorded]:
    """Drafts behind every token of cached replies, and keeps where the drafts hold what follows in the replies.

    Args:
        drafter: attached to the target of the cache.
        samples: each a prompt, then one reply to the end of the sample.
        limits: the widest and deepest draft that will be replayed.
        batch_size: B.
        drawn: how the replies were drawn; None for greedy ones.

    Raises:
        ValueError: a sample without a prompt or without a reply, or with more than one reply.
    """
    drafted = drafts_of(drafter, samples, limits, batch_size, drawn)
    return [traced(prompt, reply, trees, limits.draft_length) for prompt, reply, trees in drafted]


def drafts_of(
    drafter: Drafter,
    samples: Sequence[CachedSample],
    limits: DraftLimits = TREE,
    batch_size: int = 8,
    drawn: Drawn | None = None,
) -> Iterator[tuple[list[int], list[int], dict[int, list[Drafted]]]]:
    """Drafts behind every token of cached replies.

    Args:
        drafter: attached to the target of the cache.
        samples: each a prompt, then one reply to the end of the sample.
        limits: the widest and deepest draft.
        batch_size: B.
        drawn: how the replies were drawn; None for greedy ones.

    Yields:
        Of each sample the prompt, the reply, and by width the drafts behind all tokens of the reply but the last.

    Raises:
        ValueError: a sample without a prompt or without a reply, or with more than one reply.
    """
    recording = Recording(drafter.eval(), [limits.beam_width], limits.draft_length)
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        with torch.no_grad():
            draft_everywhere(recording, batch, limits, None if drawn is None else drawn.part(start, len(batch)))
        for sample, trees in zip(batch, recording.drafted, strict=True):
            ids, prompt = sample.input_ids.tolist(), prompt_length(sample)
            kept = {width: of_width[: len(ids) - prompt - 1] for width, of_width in trees.items()}
            yield ids[:prompt], ids[prompt:], kept


def prompt_length(sample: CachedSample) -> int:
    """Tokens of a sample's prompt.

    Args:
        sample: a prompt, then one reply to its end.

    Raises:
        ValueError: it is something else.
    """
    labelled = torch.nonzero(sample.loss_mask).flatten()
    prompt = len(sample.input_ids) - len(labelled)
    if not len(labelled) or not prompt or int(labelled[0]) != prompt:
        raise ValueError(f"sample {sample.id} must be a prompt and one reply; extract single-turn replies")
    return prompt


def draft_everywhere(
    recording: Recording, samples: Sequence[CachedSample], limits: DraftLimits, drawn: Drawn | None = None
) -> None:
    """Fills the record: all rows move by one token at a time, and one whose reply has ended repeats its last token.

    Args:
        recording: a draft is made behind each token of the replies but the last.
        samples: each a prompt, then one reply to the end of the sample.
        limits: of the drafts.
        drawn: how the replies were drawn; None for greedy ones.

    Raises:
        ValueError: a sample is something else, or lacks states that the drafter reads.
    """
    features, prompts = recording.features, [prompt_length(sample) for sample in samples]
    _check_states(samples[0], features)
    lengths_B = torch.tensor(prompts)
    first = Emitted(
        pad_sequence([sample.input_ids[1 : prompt + 1] for sample, prompt in zip(samples, prompts, strict=True)], True),
        {name: _padded(samples, prompts, name) for name in features},
        lengths_B,
    )
    longest = max(len(sample.input_ids) for sample in samples)
    state = recording.start(Opening(first, torch.stack([sample.input_ids[0] for sample in samples]), limits, longest))
    fresh = list(prompts)
    temperature = 0.0 if drawn is None else drawn.settings.temperature
    noise = None if drawn is None or limits.likeliest else drawn.noise(lengths_B)
    for tokens_B1, states, moved_B in _steps(samples, prompts, features):
        here = None if noise is None else replace(noise, first_B=lengths_B)
        cycle = Cycle(lengths_B, lengths_B.tolist(), fresh, temperature=temperature, noise=here)
        recording.propose(state, cycle, limits)
        lengths_B = lengths_B + moved_B
        fresh = moved_B.tolist()
        state = recording.advance(state, Emitted(tokens_B1, states, torch.ones_like(lengths_B)))


def _check_states(sample: CachedSample, features: Sequence[str]) -> None:
    """All samples of a cache hold the same layers, so one of them tells."""
    if missing := [name for name in features if name not in sample.hidden]:
        raise ValueError(
            f"the cache holds the states {' '.join(sample.hidden)}, and the drafter also reads {' '.join(missing)}; extract the "
            f"replies again with --layers {' '.join(dict.fromkeys([*sample.hidden, *missing]))}"
        )


def _padded(samples: Sequence[CachedSample], prompts: Sequence[int], name: str) -> Tensor:
    """The states of the prompts, [B, E, D]."""
    return pad_sequence(
        [sample.hidden[name][:prompt].float() for sample, prompt in zip(samples, prompts, strict=True)], True
    )


def _steps(
    samples: Sequence[CachedSample], prompts: Sequence[int], features: Sequence[str]
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """The next token of every reply [B, 1], the states before it [B, 1, D], and 1 where there is one, 0 where the reply has ended."""
    lengths = [len(sample.input_ids) for sample in samples]
    for step in range(1, max(length - prompt for length, prompt in zip(lengths, prompts, strict=True))):
        at = [min(prompt + step, length - 1) for prompt, length in zip(prompts, lengths, strict=True)]
        moved = [int(prompt + step < length) for prompt, length in zip(prompts, lengths, strict=True)]
        tokens = torch.stack([sample.input_ids[place] for sample, place in zip(samples, at, strict=True)])
        states = {
            name: torch.stack([sample.hidden[name][place - 1] for sample, place in zip(samples, at, strict=True)])
            for name in features
        }
        yield (
            tokens[:, None],
            {name: of_layer[:, None].float() for name, of_layer in states.items()},
            torch.tensor(moved),
        )
