"""Who decodes: this project's engine, plainly or with a drafter, and `transformers.generate` on the very same modules.

Owns how each is called so that all are given the same work. Does not know of clocks, orders or reports.

Shape legend: B batch rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.models.target.target import Target


class Contender(Protocol):
    """Anything that decodes batches. `numbers` are the prompts' places in the evaluation: sampling noise is theirs."""

    @property
    def name(self) -> str:
        """Under which its runs are kept."""
        ...

    def decode(self, samples: Sequence[Sample], numbers: Sequence[int]) -> tuple[Decoded, ...]:
        """What was emitted for each sample."""
        ...


@dataclass(frozen=True)
class EngineContender:
    """The engine with one drafter and shape, or plain; `num_rows` prompts at once, the others take the rows of those that end."""

    name: str
    engine: Engine
    settings: GenerationSettings
    num_rows: int | None = None

    def decode(self, samples: Sequence[Sample], numbers: Sequence[int]) -> tuple[Decoded, ...]:
        """Prompts of any lengths; under one seed a prompt draws the same noise whatever is decoded beside it."""
        prompts = [list(sample.prompt_ids) for sample in samples]
        generations = self.engine.generate(prompts, self.settings, request_ids=list(numbers), num_rows=self.num_rows)
        return tuple(map(_decoded, generations))


def _decoded(generation: Generation) -> Decoded:
    return Decoded(
        tuple(generation.token_ids),
        tuple(generation.accepted),
        tuple(generation.depths),
        cycles_before=generation.cycles_before,
    )


@dataclass(frozen=True)
class TransformersContender:
    """`generate` of the target's own module with its own cache; `prompt_lookup` > 0 drafts so many tokens from n-grams.

    It cannot refill rows: prompts are decoded in batches of `batch_size`, or all together by default.
    """

    name: str
    target: Target
    settings: GenerationSettings
    prompt_lookup: int = 0
    batch_size: int | None = None

    def decode(self, samples: Sequence[Sample], numbers: Sequence[int]) -> tuple[Decoded, ...]:
        """Batch after batch; see `_decode_batch`."""
        size = self.batch_size or len(samples)
        parts = [slice(start, start + size) for start in range(0, len(samples), size)]
        return tuple(decoded for part in parts for decoded in self._decode_batch(samples[part], numbers[part]))

    @torch.inference_mode()
    def _decode_batch(self, samples: Sequence[Sample], numbers: Sequence[int]) -> tuple[Decoded, ...]:
        """One batch, padded on the left. Sampling draws from torch's global generator, reseeded here.

        Raises:
            ValueError: prompt lookup is asked for over a batch of several prompts, which `generate` cannot do.
        """
        if self.prompt_lookup and len(samples) > 1:
            raise ValueError(f"prompt lookup decodes one prompt at a time, not {len(samples)}; set batch_size to 1")
        torch.manual_seed(self.settings.seed + numbers[0])
        longest = max(len(sample.prompt_ids) for sample in samples)
        ids_BT = torch.tensor(
            [[0] * (longest - len(sample.prompt_ids)) + list(sample.prompt_ids) for sample in samples],
            device=self.target.device,
        )
        mask_BT = torch.tensor(
            [[0] * (longest - len(sample.prompt_ids)) + [1] * len(sample.prompt_ids) for sample in samples],
            device=self.target.device,
        )
        steps = _StepCounter() if self.prompt_lookup else None
        asked = generation_config(self.settings, self.target, longest, self.prompt_lookup)
        with _own_settings(self.target.model, asked):
            output_BT = self.target.model.generate(
                ids_BT, attention_mask=mask_BT, generation_config=asked, streamer=steps
            )
        replies = [_until_eos(row[longest:].tolist(), self.settings.eos_token_ids) for row in output_BT]
        if steps is None:
            return tuple(Decoded(reply, (0,) * (len(reply) - 1)) for reply in replies)
        first, *later = steps.counts
        return (Decoded(replies[0], tuple(count - 1 for count in later), prefill_tokens=first),)


def lookup_refusal(target: Target) -> str:
    """Why transformers' prompt lookup cannot run a target; empty where it can."""
    if not getattr(target.model, "_is_stateful", False):  # what `generate` itself looks at
        return ""
    return (
        f"Prompt lookup is left out: {target.name} keeps a recurrent state, and Transformers drafts for no such model."
    )


def generation_config(
    settings: GenerationSettings, target: Target, prompt_length: int, prompt_lookup: int = 0
) -> GenerationConfig:
    """The engine's settings, constraints included, in the words of `generate`."""
    room = settings.max_new_tokens if target.max_positions is None else target.max_positions - prompt_length
    sampled = settings.temperature > 0
    return GenerationConfig(
        max_new_tokens=min(settings.max_new_tokens, room),
        do_sample=sampled,
        temperature=settings.temperature if sampled else 1.0,
        top_k=settings.top_k if sampled else 50,
        top_p=settings.top_p if sampled else 1.0,
        min_p=settings.min_p or None if sampled else None,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=list(settings.eos_token_ids) or None,
        pad_token_id=settings.eos_token_ids[0] if settings.eos_token_ids else 0,
        prompt_lookup_num_tokens=prompt_lookup or None,
        **({} if settings.constraints is None else settings.constraints.in_transformers()),
    )


@contextmanager
def _own_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a call leaves open from the model's generation config: inside, that is the call's own."""
    kept = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = kept


class _StepCounter(BaseStreamer):
    """Counts the tokens of each step as `generate` hands them out; the prompt comes first and is not a step."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.counts.append(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def _until_eos(reply: list[int], eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Without what `generate` pads shorter rows of a batch with."""
    for place, token in enumerate(reply):
        if token in eos_token_ids:
            return tuple(reply[: place + 1])
    return tuple(reply)
