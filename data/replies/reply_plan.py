"""Which prompts are answered together: first turns as token ids, in batches of similar length.

Owns: batches, and which prompts are dropped because they do not fit. Does not know: how a reply is made, files.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.prompt_ids import check_prompt, first_prompt_ids
from draftsmith.data.prompts import Prompt
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.json_rows import Dropped


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many prompts are answered together.

    Args:
        batch_rows: Most prompts in a batch.
        batch_tokens: Most tokens in a batch, room for replies included.
    """

    batch_rows: int = 16
    batch_tokens: int = 16384


SMALL_BATCHES = BatchOptions()


@dataclass(frozen=True)
class Stretch:
    """Prompts of similar length that share rows: one that waits takes the row of one that has ended.

    Attributes:
        prompts: with the ids of their first turn, the longest first.
        room: tokens that a row can come to hold.
    """

    prompts: list[tuple[Prompt, array]]
    room: int


@dataclass(frozen=True)
class Plan:
    """What one rank has to do. The ids are arrays, since there may be a million prompts.

    Attributes:
        batches: prompts with the ids of their first turn.
        dropped: prompts that do not fit.
        settings: of generation.
        context: the model's context in tokens, None for no limit.
        limits: how many prompts are answered together.
    """

    batches: list[list[tuple[Prompt, array]]]
    dropped: list[Dropped]
    settings: GenerationSettings
    context: int | None
    limits: BatchOptions = SMALL_BATCHES

    @property
    def num_prompts(self) -> int:
        """Prompts that will have a row."""
        return sum(len(batch) for batch in self.batches)

    def stretches(self, there: Container[str]) -> Iterator[Stretch]:
        """The prompts in stretches whose shortest row needs at least half the room of the longest.

        Args:
            there: ids of prompts that have been answered.
        """
        items = (item for batch in self.batches for item in batch if item[0].id not in there)
        prompts: list[tuple[Prompt, array]] = []
        room = 0
        for item in items:
            needed = len(item[1]) + self.settings.max_new_tokens
            if prompts and 2 * needed < room:
                yield Stretch(prompts, room)
                prompts = []
            room = room if prompts else needed
            prompts.append(item)
        if prompts:
            yield Stretch(prompts, room)

    def num_rows(self, room: int) -> int:
        """How many rows of so many tokens the limits allow, at least one."""
        return max(1, min(self.limits.batch_rows, self.limits.batch_tokens // room))


def make_plan(
    prompts: Sequence[Prompt],
    chat: ChatTemplate,
    settings: GenerationSettings,
    context: int | None,
    batches: BatchOptions = SMALL_BATCHES,
    may_be_empty: bool = False,
) -> Plan:
    """Encode each first turn, drop what the template fails on or what leaves no room for a reply, and group the rest by length.

    The longest come first, so that a batch too large for the memory fails at once. The plan depends on the prompts and
    the settings only, so a restarted run has the same batches.

    Args:
        prompts: what to ask.
        chat: renders them.
        settings: their `max_new_tokens` is the room that each row needs.
        context: the model's context in tokens, None for no limit.
        batches: how many of them at most.
        may_be_empty: a share of several may have no prompt that fits.

    Returns:
        The plan.

    Raises:
        ValueError: a repeated id, or no prompt fits.
    """
    fitting: list[tuple[Prompt, array]] = []
    dropped: list[Dropped] = []
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"the prompt id {prompt.id} occurs twice; run `draftsmith data prompts` on the file")
        seen.add(prompt.id)
        try:
            fitting.append((prompt, array("i", _fitting_ids(prompt, chat, context))))
        except ValueError as error:
            dropped.append(Dropped(prompt.place, str(error), id=prompt.id))
    if not fitting and not may_be_empty:
        raise ValueError(
            f"none of {len(prompts)} prompts can be answered" + (f": {dropped[0].reason}" if dropped else "")
        )
    fitting.sort(key=lambda item: (-len(item[1]), item[0].id))
    return Plan(_in_batches(fitting, settings.max_new_tokens, batches), dropped, settings, context, batches)


def _in_batches(
    prompts: Sequence[tuple[Prompt, array]], max_new_tokens: int, most: BatchOptions
) -> list[list[tuple[Prompt, array]]]:
    """Prompts, the longest first, in batches that keep to the limits; a prompt that is too long for them is a batch by itself."""
    batches: list[list[tuple[Prompt, array]]] = []
    for prompt in prompts:
        rows = len(batches[-1]) + 1 if batches else 0
        longest = len(batches[-1][0][1]) + max_new_tokens if batches else 0
        if batches and rows <= most.batch_rows and rows * longest <= most.batch_tokens:
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches


def _fitting_ids(prompt: Prompt, chat: ChatTemplate, context: int | None) -> list[int]:
    """Ids of the first turn.

    Raises:
        ValueError: the prompt, or a later turn of it, cannot be answered; the message is the reason.
    """
    ids = first_prompt_ids(prompt, chat)
    check_prompt(prompt, chat)  # better left out now than a failure when hours of replies are there
    if not ids:
        raise ValueError("the prompt has no token")
    if context is not None and len(ids) >= context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context {context}: no room for a reply")
    return ids
